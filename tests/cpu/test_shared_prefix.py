"""Prefixes that several sequences share are read once for all of them on the CPU, and no bit of a result changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case
from tiny_models import tiny_model

import hf_paged_kernels as kernels
from hf_paged import Engine, EngineConfig, SamplingParams
from hf_paged.core.shared_prefix import SharedPrefix
from hf_paged.runtime import shared_prefix

pytestmark = pytest.mark.skipif(not kernels.supports("cpu", "cpu"), reason="no compiled kernels")

# The first of a group is its shortest, whose window hides the fewest blocks.
LENGTHS = [(1, 520), (1, 530), (1, 300), (1, 601), (1, 700), (1, 310), (1, 90), (1, 290), (1, 521), (9, 40)]
GROUPS = [(512, (0, 1, 3, 4, 8)), (256, (2, 5)), (64, (6, 7))]  # shared keys, members; 64 are too few for the kernel
INT8, FP8 = torch.int8, torch.float8_e4m3fn
CASES = {
    "plain": {},
    "multi_head": dict(heads=(4, 4)),
    "multi_query": dict(heads=(7, 1)),
    "more_rows_than_a_tile": dict(heads=(32, 2), k_dim=16, v_dim=16),
    "more_heads_than_a_tile": dict(heads=(50, 1), k_dim=16, v_dim=16),
    "dims": dict(heads=(4, 2), k_dim=24, v_dim=40),
    "odd_dims": dict(heads=(4, 2), k_dim=7, v_dim=13),
    "block_64": dict(heads=(4, 2), block_size=64),
    "window": dict(window=300, heads=(4, 2)),
    "chunk": dict(chunk=300, heads=(4, 2)),
    "softcap": dict(softcap=5.0),
    "sinks": dict(sinks=True),
    "alibi": dict(alibi=True),
    "everything": dict(window=400, softcap=8.0, sinks=True, alibi=True, k_dim=24, v_dim=40, block_size=32),
    "images": dict(images={9: [(33, 39)]}),
    "bf16": dict(dtype=torch.bfloat16, cache_dtype=torch.bfloat16),
    "bf16_cache": dict(cache_dtype=torch.bfloat16, window=300),
    "fp16": dict(dtype=torch.float16, cache_dtype=torch.float16),
    "int8": dict(cache_dtype=INT8),
    "int8_multi_head": dict(cache_dtype=INT8, heads=(2, 2), dtype=torch.bfloat16),
    "fp8": dict(cache_dtype=FP8, sinks=True),
    "fp8_window": dict(cache_dtype=FP8, window=300, heads=(10, 2), dtype=torch.float16),
}


def batch_of(case: Case, groups):
    """A batch whose groups share blocks, and the same told to the kernels."""
    for count, (first, *others) in groups:
        for member in others:
            case.keys[member][:count], case.values[member][:count] = case.keys[first][:count], case.values[first][:count]
    *tensors, metadata = case.batch()
    for count, (first, *others) in groups:
        for member in others:
            metadata.block_table[member, : count // case.block_size] = metadata.block_table[first, : count // case.block_size]
    context = [total - new for new, total in case.lengths if new == 1]
    found = [SharedPrefix(count // case.block_size, members) for count, members in groups]
    shared = shared_prefix.shared_prefixes(found, context, case.block_size, torch.device("cpu"))
    return tensors, metadata, shared


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_without_groups(name):
    case = Case(lengths=list(LENGTHS), **CASES[name])
    tensors, metadata, shared = batch_of(case, GROUPS)

    def run():
        return kernels.attention_(*tensors, metadata, **case.options, **case.scales, backend="cpu")

    apart = run()
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}[case.dtype]
    torch.testing.assert_close(apart.double(), case.dense(), atol=tolerance, rtol=tolerance)
    metadata.shared = shared
    # What is read for all is looked up in the table of a tile's first member: the others' blocks are not asked for.
    per_tile = max(1, 48 // (case.heads[0] // case.heads[1]))
    for count, members in GROUPS:
        others = [member for i, member in enumerate(members) if i % per_tile]
        metadata.block_table[others, : count // 256 * 256 // case.block_size] = -1
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(), apart)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("change", ["unknown", "twice", "too_long"])
def test_groups_that_the_batch_cannot_have_are_refused_before_anything_is_written(change):
    case = Case(lengths=list(LENGTHS))
    tensors, metadata, shared = batch_of(case, GROUPS)
    metadata.shared = shared
    if change == "unknown":
        shared.members[1] = 10
    elif change == "twice":
        shared.members[1] = shared.members[0]
    else:
        shared.prefix_lens[0] = 520
    before = [tensor.clone() for tensor in tensors[3:]]
    with pytest.raises(ValueError, match="shared names sequence"):
        kernels.attention_(*tensors, metadata, **case.options, backend="cpu")
    for tensor, old in zip(tensors[3:], before, strict=True):
        assert torch.equal(tensor.nan_to_num(7), old.nan_to_num(7))


# ---- in the engine ------------------------------------------------------------------------------------------------

SYSTEM = [(7 * i) % 60 + 1 for i in range(300)]
PROMPTS = [[*SYSTEM, *end] for end in ([5], [9, 14, 3], [60, 2], [8] * 20)] + [[4, 8, 15]]
TOKENS = 4


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("llama", dict(exact=True)), ("llama", dict(kv_dtype="int8")), ("gemma3_text", {}), ("mistral", {})],
    ids=str,
)
def test_tokens_of_an_engine_are_those_without_groups(family, options, monkeypatch):
    cheap = replace(shared_prefix.READINGS["cpu"], min_saved_bytes=1)
    monkeypatch.setitem(shared_prefix.READINGS, "cpu", cheap)
    model = tiny_model(family, max_position_embeddings=512).eval()
    params = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=2)
    results = []
    for grouped in (True, False):
        with Engine(model, config=EngineConfig(max_batch_tokens=1024, **options)) as engine:
            if not grouped:
                engine._runner.prefixes = None
            outputs = engine.generate(PROMPTS[:1], params) + engine.generate(PROMPTS[1:], params)
            results.append([(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs])
            if grouped:  # three later prompts take 256 tokens from the first, and decode behind the step that prefills them
                assert engine.stats()["shared_prefix_tokens"] == 2 * 256 * (TOKENS - 1)
    assert results[0] == results[1]


def test_little_to_share_is_left_alone():
    model = tiny_model("llama", max_position_embeddings=512).eval()
    with Engine(model) as engine:
        engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=TOKENS))
        assert engine.stats()["shared_prefix_tokens"] == 0
