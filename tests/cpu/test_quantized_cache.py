"""Engines whose keys and values are kept in 8 bits: the reference's results, the same bits however they come about."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import CACHE, tiny_model

import hf_paged
from hf_paged import Engine, EngineConfig, SamplingParams, VerificationFailed
from hf_paged_kernels import ops

pytestmark = pytest.mark.skipif(not ops.supports("cpu", "cpu"), reason="no compiled kernels")
KV_DTYPES = pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", vocab_size=320)


def config(kv_dtype: str | None, **options) -> EngineConfig:
    return EngineConfig(**{"block_size": 16, "max_batch_tokens": 48, "kv_dtype": kv_dtype, **options})


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]


def results(engine, jobs, params=GREEDY) -> list[tuple[list[int], list[float]]]:
    """(tokens, log-probabilities) of every completion."""
    completions = [completion for output in engine.generate(jobs, params) for completion in output.outputs]
    return [(c.token_ids, [place[t].logprob for place, t in zip(c.logprobs, c.token_ids)]) for c in completions]


@KV_DTYPES
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "llama4_text", "bloom", "deepseek_v3"])
def test_tokens_are_the_references_in_a_third_of_the_memory(family, kv_dtype):
    """Heads of these models are so small that the scales count; of 64 dimensions it is 27 %."""
    model, jobs = tiny_model(family, vocab_size=320), prompts(90, 9, 33)
    found, memory = [], []
    for backend, dtype in (("cpu", kv_dtype), ("reference", kv_dtype), ("cpu", None)):
        with Engine(model, config=config(dtype, attention_backend=backend)) as engine:
            found.append(results(engine, jobs))
            memory.append(engine.stats()["kv_bytes_peak"])
            engine.check_integrity()
    (tokens, logprobs), (expected, expected_logprobs), (_, exact) = (zip(*result) for result in found)
    assert tokens == expected
    got, want, exact = (torch.tensor(rows) for rows in (logprobs, expected_logprobs, exact))
    rounding = (want - exact).abs().mean()
    # A sum that differs in its last bit now and then rounds to the next step: a part of what rounding does at all.
    assert (got - want).abs().mean() < 0.1 * rounding and rounding > 1e-3
    assert memory[0] == memory[1] < 0.45 * memory[2]


@KV_DTYPES
def test_bits_do_not_depend_on_batches_prefixes_preemption_or_a_new_cache(model, kv_dtype):
    jobs, params = prompts(70, 9, 33, 50), replace(GREEDY, max_tokens=40)
    with Engine(model, config=config(kv_dtype)) as engine:
        alone = [results(engine, [job], params)[0] for job in jobs]
        assert results(engine, jobs, params) == alone  # beside each other, and their prompts from the prefix cache
        assert engine.stats()["prefix_hit_tokens"] > 100
        engine.sleep()
        assert results(engine, jobs, params) == alone
        for num_blocks in (9, 40):  # too few for all of them, and enough
            engine.reset_stats()
            engine.resize_kv_cache(num_blocks * engine._cache.bytes_per_block(0))
            assert results(engine, jobs, params) == alone
            assert (engine.stats()["preemptions"] > 0) == (num_blocks == 9)
        engine.check_integrity()


@KV_DTYPES
def test_forks_write_to_copies_of_their_own(model, kv_dtype):
    """Three completions go on from one partly filled block."""
    params = SamplingParams(n=3, temperature=1.2, seed=3, max_tokens=12, ignore_eos=True, logprobs=0)
    found = []
    for backend in ("cpu", "reference"):
        with Engine(model, config=config(kv_dtype, attention_backend=backend)) as engine:
            found.append([tokens for tokens, _ in results(engine, prompts(21), params)])
    assert found[0] == found[1] and len(set(map(tuple, found[0]))) == 3


@KV_DTYPES
@pytest.mark.parametrize("guesses", ["ngram", "draft"])
def test_guessing_changes_nothing(model, kv_dtype, guesses):
    jobs, params = [[70, 71, 72, 73, 74] * 6, prompts(30)[0]], replace(GREEDY, max_tokens=60)
    draft = tiny_model("llama", vocab_size=320) if guesses == "draft" else None
    found = []
    for options in ({}, dict(speculation=guesses)):
        with Engine(model, config=config(kv_dtype, **options), draft_model=draft if options else None) as engine:
            found.append(results(engine, jobs, params))
            assert not options or engine.stats()["draft_tokens"] > 0
    assert found[0] == found[1]


@KV_DTYPES
@pytest.mark.parametrize(
    "options", [dict(num_beams=3), dict(prompt_lookup_num_tokens=4), dict(guidance_scale=1.5)], ids=str
)
def test_stocks_own_loops_read_what_the_pages_keep(model, kv_dtype, options):
    """Rows that fork, are reordered and cut back give the tokens they give on the reference's pages."""
    batch = dict(input_ids=torch.tensor(prompts(40)), max_new_tokens=8, do_sample=False)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    found = []
    for backend in ("cpu", "reference"):
        hf_paged.patch(model, config(kv_dtype, attention_backend=backend))
        try:
            found.append(model.generate(**batch, **options))
            assert not hf_paged.explain(model).calls
        finally:
            hf_paged.unpatch(model)
    assert torch.equal(*found)


@KV_DTYPES
def test_a_returned_cache_holds_the_rounded_numbers_and_goes_on_from_them(model, kv_dtype):
    ids = torch.tensor(prompts(40))
    options = dict(do_sample=False, return_dict_in_generate=True)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **options)
    hf_paged.patch(model, config(kv_dtype))
    try:
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **options)
        part = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **options)
        cache = getattr(part, CACHE)
        rounded, exact = cache.layers[0].keys[:, :, :40], getattr(plain, CACHE).layers[0].keys[:, :, :40]
        assert rounded.dtype == torch.float32
        error = (rounded - exact).abs().amax() / exact.abs().amax()
        assert 0 < error < (0.005 if kv_dtype == "int8" else 0.04)
        mask = torch.ones_like(part.sequences)
        rest = model.generate(part.sequences, attention_mask=mask, max_new_tokens=4, **{CACHE: cache}, **options)
        assert torch.equal(rest.sequences, whole.sequences)
    finally:
        hf_paged.unpatch(model)


@KV_DTYPES
def test_explain_and_verify_tell_of_the_rounding(model, kv_dtype):
    hf_paged.patch(model, config(kv_dtype), verify=True)
    try:
        explanation = hf_paged.explain(model)
    finally:
        hf_paged.unpatch(model)
    assert 1e-4 < explanation.largest_difference < 0.1
    assert f"limit   keys and values are rounded to {kv_dtype}" in str(explanation)


def test_verify_still_sees_a_wrong_result_under_a_rounded_cache(model, monkeypatch):
    run = ops.attention_
    monkeypatch.setattr(ops, "attention_", lambda *args, **options: run(*args, **options) * 1.5)
    with pytest.raises(VerificationFailed, match="gives other results"):
        hf_paged.patch(model, config("int8"), verify=True)
