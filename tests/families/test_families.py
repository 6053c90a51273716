"""Every supported family against stock transformers in fp32: the same greedy tokens, logits within 1e-4."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

import hf_paged
from hf_paged import EngineConfig, SamplingParams
from hf_paged.hf.spec import SUPPORTED

NEW = 24


def prompts(vocab_size: int) -> list[list[int]]:
    """Ragged lengths around blocks, chunks and windows; two share a long prefix."""
    generator = torch.Generator().manual_seed(7)
    make = lambda length: torch.randint(3, vocab_size, (length,), generator=generator).tolist()  # noqa: E731
    shared = make(48)
    return [make(13), make(14), make(15), make(1), make(17), shared + make(5), make(70), shared + make(12)]


def stock_greedy(model, prompt: list[int]):
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    model = tiny_model(request.param)
    jobs = prompts(model.config.vocab_size)
    return model, jobs, [stock_greedy(model, prompt) for prompt in jobs]


def blocks_of(model, tokens: int) -> int:
    """Bytes of a cache that holds about `tokens` tokens of full attention."""
    layers = hf_paged.hf.patch.patch_of(model).adapter.layers
    return sum(layer.bytes_per_token(4) for layer in layers) * tokens


def check(engine, jobs, expected):
    outputs = engine.generate(jobs, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
    for output, (tokens, _) in zip(outputs, expected):
        assert output.outputs[0].token_ids == tokens
    engine.check_integrity()


def test_chunked_prefill_mixed_with_decodes_and_prefix_hits(family):
    model, jobs, expected = family
    config = EngineConfig(block_size=16, max_batch_tokens=24, max_num_seqs=4)
    with hf_paged.Engine(model, config=config) as engine:
        check(engine, jobs, expected)
        engine.reset_stats()
        check(engine, jobs, expected)  # again, now with every prefix cached
        assert engine.stats()["prefix_hit_tokens"] > 0


def test_preemption(family):
    model, jobs, expected = family
    hf_paged.patch(model)
    memory = blocks_of(model, 112)
    hf_paged.unpatch(model)
    config = EngineConfig(block_size=16, max_batch_tokens=64, max_num_seqs=6, kv_cache_memory=memory)
    with hf_paged.Engine(model, config=config) as engine:
        check(engine, jobs, expected)
        windows = {layer.window for layer in engine.model.layers}
        if windows == {None}:  # with windows the same memory holds more
            assert engine.stats()["preemptions"] > 0


def test_reference_kernels_without_fusion(family):
    model, jobs, expected = family
    config = EngineConfig(block_size=16, max_batch_tokens=96, attention_backend="reference", fuse=False)
    with hf_paged.Engine(model, config=config) as engine:
        check(engine, jobs, expected)


def test_generate_returns_stock_tokens_and_logits(family):
    model, jobs, expected = family
    width = max(map(len, jobs))
    ids = torch.zeros(len(jobs), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(jobs):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    hf_paged.patch(model, max_batch_tokens=64)
    try:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        hf_paged.unpatch(model)
    for row, (tokens, logits) in enumerate(expected):
        assert out.sequences[row, width:].tolist() == tokens
        mine = torch.stack([step[row] for step in out.logits])
        assert (mine - logits).abs().max() <= 1e-4 * max(1.0, logits.abs().max().item())


def test_unpatch_restores_every_bit(family):
    model, _, _ = family
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    with hf_paged.Engine(model) as engine:
        engine.generate([[5, 6, 7]], SamplingParams(max_tokens=3))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [type(module) for module in model.modules()] == kinds


def test_the_list_of_supported_families_is_what_is_tested():
    from tiny_models import tiny_config

    assert {tiny_config(name).model_type for name in FAMILIES} == SUPPORTED
