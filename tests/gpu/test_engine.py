"""The whole engine on the Triton kernels: stock transformers' own tokens, in fp32, and quantized caches."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

import hf_paged
from hf_paged import Engine, EngineConfig, SamplingParams

NUM_NEW = 5
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)


@pytest.fixture(scope="module")
def model(device):
    return tiny_model("llama", vocab_size=320).to(device)


def config(**changes) -> EngineConfig:
    settings = dict(block_size=16, max_batch_tokens=32, max_num_seqs=6, attention_backend="triton", fuse=False)
    return EngineConfig(**{**settings, **changes})


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]


def stock(model, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False)
    return out[0, len(prompt) :].tolist()


# GQA; windows of 8 in some layers and soft caps in Gemma, sinks and windows in GPT-OSS
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_greedy_tokens_are_those_of_stock(device, family):
    """Mixed lengths, prompts in chunks beside decodes, and the second time from cached prefixes."""
    model = tiny_model(family, vocab_size=320).to(device)
    jobs = prompts(3, 40, 17)
    expected = [stock(model, job) for job in jobs]
    with Engine(model, config=config()) as engine:
        for _ in range(2):
            outputs = engine.generate(jobs, GREEDY)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        assert engine.stats()["prefix_hit_tokens"] > 0
        engine.check_integrity()


def test_completions_share_their_prompt(model):
    """Each writes to its own copy of the block in which the prompt ends."""
    prompt = prompts(21)[0]
    params = SamplingParams(n=3, temperature=1.2, seed=3, max_tokens=3, ignore_eos=True)
    outputs = []
    for backend in ("triton", "reference"):
        with Engine(model, config=config(attention_backend=backend)) as engine:
            outputs.append([completion.token_ids for completion in engine.generate([prompt], params)[0].outputs])
    assert outputs[0] == outputs[1] and len(set(map(tuple, outputs[0]))) > 1


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_a_quantized_cache_gives_the_references_tokens_in_half_the_memory(model, kv_dtype):
    jobs, outputs, logprobs = prompts(20, 9), [], []
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=0)
    for backend, dtype in (("triton", kv_dtype), ("reference", kv_dtype), ("reference", None)):
        with Engine(model, config=config(attention_backend=backend, kv_dtype=dtype)) as engine:
            results = [output.outputs[0] for output in engine.generate(jobs, params)]
            outputs.append([result.token_ids for result in results])
            chosen = [[place[token].logprob for place, token in zip(r.logprobs, r.token_ids)] for r in results]
            logprobs.append(torch.tensor(chosen))
    assert outputs[0] == outputs[1]
    torch.testing.assert_close(logprobs[0], logprobs[1], atol=1e-3, rtol=0)
    assert not torch.equal(logprobs[1], logprobs[2])  # the cache was rounded indeed


def test_generate_of_a_patched_model_with_beams(model):
    """Rows that fork and are reordered by reference."""
    ids = torch.tensor([prompts(19)[0]], device=model.device)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=3, num_beams=2, do_sample=False)
    expected = model.generate(ids, **options)
    hf_paged.patch(model, config())
    try:
        assert torch.equal(model.generate(ids, **options), expected)
        text = str(hf_paged.explain(model))
        assert "triton" in text
    finally:
        hf_paged.unpatch(model)
