"""The attention kernels against an independent dense float64 computation, and against themselves in other batches."""

from __future__ import annotations

import pytest
import torch
from attention_cases import NAN, Case, rounded

import hf_paged_kernels as kernels

BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not kernels.supports("cpu", "cpu"), reason="no compiled kernels")),
    "reference",
]
# of MIXED: at the beginning, behind cached tokens, two side by side, and over the whole of a chunk
IMAGES = {3: [(0, 3)], 4: [(8, 30), (30, 40)], 5: [(284, 300)], 6: [(5, 6), (7, 39)], 8: [(470, 500)]}
INT8, FP8 = torch.int8, torch.float8_e4m3fn
needs_cpu = pytest.mark.skipif(not kernels.supports("cpu", "cpu"), reason="no compiled kernels")


CASES = {
    "plain": Case(),
    "multi_head": Case(heads=(4, 4)),
    "multi_query": Case(heads=(7, 1)),
    "group_of_5": Case(heads=(10, 2)),
    "group_of_71": Case(heads=(71, 1), lengths=[(1, 40), (20, 300)]),
    "dim_16": Case(k_dim=16, v_dim=16),
    "dim_40": Case(k_dim=40, v_dim=40),
    "dim_80": Case(k_dim=80, v_dim=80),
    "dim_96": Case(k_dim=96, v_dim=96),
    "dim_128": Case(heads=(8, 2), k_dim=128, v_dim=128),
    "dim_256": Case(heads=(4, 1), k_dim=256, v_dim=256),
    "dim_odd": Case(k_dim=7, v_dim=13),
    "dims_differ": Case(k_dim=48, v_dim=32),
    "dims_differ_mla": Case(heads=(4, 1), k_dim=192, v_dim=128),
    "latent_mla": Case(heads=(128, 1), k_dim=576, v_dim=512, lengths=[(1, 300), (3, 20)], spread=1.0),
    "window_1": Case(window=1),
    "window_7": Case(window=7),
    "window_100": Case(window=100),
    "window_300": Case(window=300),
    "chunk_1": Case(chunk=1),
    "chunk_24": Case(chunk=24),
    "chunk_64": Case(chunk=64, heads=(4, 1)),
    "chunk_300": Case(chunk=300, block_size=32),
    "softcap": Case(softcap=5.0),
    "sinks": Case(sinks=True),
    "alibi": Case(alibi=True),
    "images": Case(images=IMAGES),
    "images_window": Case(images=IMAGES, window=20, sinks=True, heads=(4, 2), k_dim=24, v_dim=40),
    "images_window_1": Case(images=IMAGES, window=1),
    "images_many_heads": Case(images={1: [(3, 200)]}, heads=(71, 1), lengths=[(1, 40), (200, 300)], window=90),
    "images_int8_cache": Case(images=IMAGES, cache_dtype=INT8, window=50, block_size=32),
    "images_bf16_cache": Case(images=IMAGES, cache_dtype=torch.bfloat16, softcap=9.0),
    "gpt_oss": Case(heads=(8, 1), window=32, sinks=True),
    "gemma": Case(heads=(4, 2), window=64, softcap=20.0, k_dim=128, v_dim=128),
    "everything": Case(window=50, softcap=8.0, sinks=True, alibi=True, k_dim=24, v_dim=40, block_size=32),
    "block_32": Case(block_size=32, window=40),
    "block_64": Case(block_size=64),
    "block_48": Case(block_size=48, window=90),
    "bf16_cache": Case(cache_dtype=torch.bfloat16),
    "bf16_cache_window": Case(cache_dtype=torch.bfloat16, window=90, k_dim=72, v_dim=72),
    "fp16_cache": Case(cache_dtype=torch.float16),
    "bf16_model": Case(dtype=torch.bfloat16, cache_dtype=torch.bfloat16),
    "fp16_model": Case(dtype=torch.float16, cache_dtype=torch.float16, sinks=True),
    "bf16_model_fp32_cache": Case(dtype=torch.bfloat16),
    "int8_cache": Case(cache_dtype=INT8),
    "int8_cache_bf16_model": Case(cache_dtype=INT8, dtype=torch.bfloat16, k_dim=128, v_dim=128, heads=(4, 1)),
    "int8_cache_window": Case(cache_dtype=INT8, window=100, k_dim=72, v_dim=40, sinks=True),
    "int8_cache_multi_query": Case(cache_dtype=INT8, heads=(7, 1), block_size=48, chunk=300),
    "fp8_cache": Case(cache_dtype=FP8),
    "fp8_cache_fp16_model": Case(cache_dtype=FP8, dtype=torch.float16, block_size=64),
    "fp8_cache_latent_mla": Case(cache_dtype=FP8, heads=(16, 1), k_dim=144, v_dim=128, lengths=[(1, 300), (3, 20)]),
    "fp8_cache_everything": Case(cache_dtype=FP8, window=50, softcap=8.0, sinks=True, alibi=True, k_dim=7, v_dim=13),
    "large_scores": Case(spread=60.0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_float64(name, backend):
    case = CASES[name]
    got, want = case.run(backend), case.dense()
    assert got.dtype == case.dtype and got.shape == want.shape
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}[case.dtype]
    if name == "large_scores":  # a score of 300 has 3e-5 to lose in float32
        tolerance = 2e-4
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@needs_cpu
def test_error_is_as_small_as_that_of_torch():
    case = Case(lengths=[(400, 400)], heads=(8, 8), spread=4.0)
    query, key, value = (x[0].transpose(0, 1) for x in (case.queries, case.keys, case.values))
    stock = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(0, 1)
    want = case.dense()
    ours, theirs = ((x.double() - want).square().mean().sqrt().item() for x in (case.run("cpu"), stock))
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["merged_qkv", "heads_first", "last_dim_strided"])
def test_strided_inputs(backend, layout):
    case = CASES["plain"]
    query, key, value, *rest = case.batch()
    want = kernels.attention_(query, key, value, *rest, **case.options, backend=backend)
    _, _, _, *rest = case.batch()
    if layout == "merged_qkv":
        merged = torch.cat([query.flatten(1), key.flatten(1), value.flatten(1)], 1)
        parts = merged.split([9 * 64, 3 * 64, 3 * 64], 1)
        query, key, value = (part.unflatten(1, (-1, 64)) for part in parts)
    elif layout == "heads_first":
        query, key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value))
    else:
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    assert not query.is_contiguous()
    got = kernels.attention_(query, key, value, *rest, **case.options, backend=backend)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_filled_and_caches_may_be_slices_of_one_tensor(backend):
    case = CASES["plain"]
    query, key, value, k_cache, v_cache, metadata = case.batch()
    for dim in (1, 2):  # two layers side by side: within a block, within a head
        layers = [torch.stack([torch.full_like(cache, NAN), cache], dim) for cache in (k_cache, v_cache)]
        out = torch.full((len(query), 9, 64), NAN)
        got = kernels.attention_(query, key, value, *(layer.select(dim, 1) for layer in layers), metadata,
                                 **case.options, out=out, backend=backend)  # fmt: skip
        assert got is out
        assert torch.equal(out, case.run(backend))
        assert all(layer.select(dim, 0).isnan().all() for layer in layers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_keys_the_cache_is_read_and_not_written(backend):
    case = CASES["plain"]
    query, key, value, k_cache, v_cache, metadata = case.batch()
    want = kernels.attention_(query, key, value, k_cache, v_cache, metadata, **case.options, backend=backend)
    before = k_cache.clone(), v_cache.clone()
    got = kernels.attention_(query, None, None, k_cache, v_cache, metadata, **case.options, backend=backend)
    assert torch.equal(got, want)
    for cache, old in zip((k_cache, v_cache), before, strict=True):
        assert torch.equal(cache.nan_to_num(7), old.nan_to_num(7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_reads_blocks_that_another_of_the_same_call_fills(backend):
    """The reader comes first in the batch: all writing must be done before any reading."""
    case = Case(lengths=[(64, 64)], heads=(4, 2), k_dim=32, v_dim=32)
    query, key, value, k_cache, v_cache, metadata = case.batch()
    want = kernels.attention_(query, key, value, k_cache, v_cache, metadata, **case.options, backend=backend)
    k_cache.fill_(NAN), v_cache.fill_(NAN)
    order = torch.cat([torch.arange(48, 64), torch.arange(48)])  # sequence 0: the last 16 tokens; 1: the 48 before
    shared = kernels.AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, 16, 64]).int(), seq_lens=torch.tensor([64, 48]).int(),
        block_table=metadata.block_table.repeat(2, 1), slot_mapping=metadata.slot_mapping[order], max_seqlen_q=48,
        max_seqlen_k=64,
    )  # fmt: skip
    got = kernels.attention_(query[order], key[order], value[order], k_cache, v_cache, shared, **case.options,
                             backend=backend)  # fmt: skip
    torch.testing.assert_close(got, want[order], atol=1e-6, rtol=0)
    assert backend != "cpu" or torch.equal(got, want[order])


# ---- the same bits, whatever the batch ----------------------------------------------------------------------------

INVARIANT = {
    "plain": Case(lengths=[(530, 530), (40, 300)]),
    "window": Case(lengths=[(300, 600), (40, 40)], window=70, heads=(4, 2)),
    "chunk": Case(lengths=[(300, 600), (40, 40)], chunk=70, heads=(4, 2)),
    "everything": Case(lengths=[(300, 560)], window=270, softcap=8.0, sinks=True, alibi=True, k_dim=24, v_dim=40),
    "bf16_cache": Case(lengths=[(300, 560), (9, 9)], cache_dtype=torch.bfloat16, heads=(7, 1), v_dim=128),
    "block_64": Case(lengths=[(290, 290), (31, 600)], block_size=64, k_dim=80, v_dim=80),
    "int8_cache": Case(lengths=[(300, 560), (9, 9)], cache_dtype=INT8, heads=(6, 2), window=200, block_size=32),
    "fp8_cache": Case(lengths=[(290, 290), (31, 600)], cache_dtype=FP8, k_dim=80, v_dim=24, sinks=True),
}


@needs_cpu
@pytest.mark.parametrize("name", INVARIANT)
def test_bits_do_not_depend_on_chunks(name):
    case = INVARIANT[name]
    want = case.run("cpu")
    for chunk in (1, 7, 64):
        offset = 0
        for seq, (new, _) in enumerate(case.lengths):
            firsts = range(0, new, chunk) if chunk > 1 else range(0, new, 13)
            for first in firsts:
                count = min(chunk, new - first)
                got = case.run("cpu", [(seq, first, count)], block_seed=first)
                assert torch.equal(got, want[offset + first : offset + first + count]), (chunk, seq, first)
            offset += new


@needs_cpu
@pytest.mark.parametrize("name", INVARIANT)
def test_bits_do_not_depend_on_batch_mates(name):
    case = INVARIANT[name]
    want = case.run("cpu")
    new = case.lengths[0][0]
    steps = [(len(case.lengths) - 1, 0, 3), (0, new - 1, 1), (0, 5, 100), (0, 200, 1), (0, 0, 2)]
    got = case.run("cpu", steps, block_seed=3)
    assert torch.equal(got[3], want[new - 1])
    assert torch.equal(got[4:104], want[5:105])
    assert torch.equal(got[104], want[200])
    assert torch.equal(got[105:], want[:2])


@needs_cpu
@pytest.mark.parametrize("name", INVARIANT)
def test_bits_do_not_depend_on_threads(name):
    """One long sequence is split over the threads; its partial results are merged in one order."""
    case = INVARIANT[name]
    new = case.lengths[0][0]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((case.run("cpu"), case.run("cpu", [(0, new - 1, 1)])))
    finally:
        torch.set_num_threads(threads)
    for whole, last in results:
        assert torch.equal(whole, results[0][0])
        assert torch.equal(last[0], results[0][0][new - 1])


@needs_cpu
def test_bits_do_not_depend_on_the_strides_of_the_cache_or_head_neighbours():
    """The first KV head alone, as one rank of a tensor-parallel group would hold it."""
    for dtype in (torch.float32, INT8):
        case = Case(heads=(6, 2), cache_dtype=dtype)
        query, key, value, k_cache, v_cache, metadata = case.batch()
        want = kernels.attention_(query, key, value, k_cache.clone(), v_cache.clone(), metadata, **case.options,
                                  **case.scales, backend="cpu")  # fmt: skip
        first = {name: scale if scale is None else scale[:, :1] for name, scale in case.scales.items()}
        got = kernels.attention_(query[:, :3], key[:, :1], value[:, :1], k_cache[:, :1], v_cache[:, :1], metadata,
                                 **case.options, **first, backend="cpu")  # fmt: skip
        assert torch.equal(got, want[:, :3])


# ---- the cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_store_then_gather_gives_the_rounded_keys_back(backend, dtype, cache_dtype):
    key, value = torch.randn(50, 3, 40).to(dtype), torch.randn(50, 3, 24).to(dtype)
    k_cache, v_cache = kernels.allocate_kv(6, 3, 40, 24, 16, cache_dtype, "cpu")
    k_cache.fill_(7), v_cache.fill_(7)
    row = torch.tensor([4, 0, 2, 5], dtype=torch.int32)
    position = torch.arange(50)
    slots = row.long()[position // 16] * 16 + position % 16
    slots[20] = -1
    kernels.store_kv(key, value, k_cache, v_cache, slots, backend=backend)
    got_key, got_value = kernels.gather_kv(k_cache, v_cache, row, 50)
    key[20], value[20] = 7, 7
    assert torch.equal(got_key, key.to(cache_dtype)) and torch.equal(got_value, value.to(cache_dtype))
    untouched = [1, 3]
    assert (k_cache[untouched] == 7).all() and (v_cache[untouched] == 7).all()
    assert (k_cache[5, :, :, 2:] == 7).all() and (v_cache[5, :, 2:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, INT8, FP8])
def test_copy_blocks(dtype):
    caches = kernels.allocate_kv(5, 2, 8, 8, 16, dtype, "cpu")
    scales = dict(zip(("k_scale", "v_scale"), kernels.allocate_scales(caches[1])))
    kernels.store_kv(*torch.randn(2, 80, 2, 8), *caches, torch.arange(80), **scales)
    before = [kernels.gather_kv(*caches, torch.tensor([0, 1, 2, 0, 1]), 80, **scales)]
    kernels.copy_blocks(*caches, torch.tensor([[0, 3], [1, 4]]), **scales)
    for got, want in zip(kernels.gather_kv(*caches, torch.arange(5), 80, **scales), *before, strict=True):
        assert torch.equal(got, want)


# ---- quantized caches ---------------------------------------------------------------------------------------------


def hard_rows(dim: int) -> torch.Tensor:
    """[T, 1, dim]: of every size, ties between two steps, zeros, and what is no number."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(40, dim, generator=generator) * 10.0 ** torch.arange(-36, 36, 1.8)[:, None]
    ties = torch.arange(dim).float() + 0.5
    ties[0] = 127  # the scale is 1: these are halves of int8's step, and of several of e4m3's
    eighths = torch.arange(dim).float() / 16
    eighths[0] = 448
    odd = torch.zeros(5, dim)
    odd[1, 3], odd[2, 0], odd[3, dim - 1], odd[4] = NAN, float("inf"), -float("inf"), 3e38
    odd[3, 0] = 1
    return torch.cat([normal, torch.stack([ties, -ties, eighths, eighths * 2**-6, -eighths * 2**-8]), odd])[:, None]


@needs_cpu
@pytest.mark.parametrize("new_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("dim", [64, 37])
def test_rows_are_rounded_as_the_reference_rounds_them(dim, dtype, new_dtype):
    rows = hard_rows(dim).to(new_dtype)
    stored = []
    for backend in ("cpu", "reference"):
        caches = kernels.allocate_kv(4, 1, dim, dim, 16, dtype, "cpu")
        scales = kernels.allocate_scales(caches[1])
        for tensor in (*caches, *scales):
            tensor.view(torch.uint8).fill_(7)
        kernels.store_kv(rows, rows.flip(0), *caches, torch.arange(len(rows)), k_scale=scales[0], v_scale=scales[1],
                         backend=backend)  # fmt: skip
        stored.append([tensor.view(torch.uint8) for tensor in (*caches, *scales)])
    for got, want in zip(*stored, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_what_is_no_number_reaches_those_who_see_it_and_no_other_head_or_sequence(bad, what, dtype, backend):
    """Each sequence attends to one bad row, in a decode, in a prompt of few rows and in one of many."""
    case = Case(lengths=[(1, 40), (3, 30), (60, 60), (1, 40)], heads=(4, 2), cache_dtype=dtype)
    clean = case.run(backend)
    for seq, position in ((0, 7), (1, 9), (2, 50)):
        (case.keys if what == "key" else case.values)[seq][position, 1, 2] = bad
    got = case.run(backend)
    assert got[:4, 2:].isnan().all() and got[54:64, 2:].isnan().all()
    assert torch.equal(got[:, :2], clean[:, :2]) and torch.equal(got[64:], clean[64:])


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_rounding_to_8_bits_costs_no_more_than_the_type_has(dtype):
    case = Case(cache_dtype=dtype)
    for rows in (*case.keys, *case.values):
        error = (rounded(rows, dtype) - rows).abs()
        step = rows.abs().amax(-1, keepdim=True) / 254 if dtype == INT8 else rows.abs() / 16 + 1e-4
        assert (error <= step * 1.001).all()


# ---- wrong arguments ----------------------------------------------------------------------------------------------


def bad_head_size(case):
    case["query"] = case["query"][..., :32]


def bad_head_count(case):
    case["query"] = case["query"][:, :8]


def bad_query_dtype(case):
    case["query"] = case["query"].double()


def bad_rows(case):
    case["query"] = case["query"][1:]


def bad_key_alone(case):
    case["value"] = None


def bad_key_shape(case):
    case["key"] = case["key"][:, :2]


def bad_value_dtype(case):
    case["value"] = case["value"].bfloat16()


def bad_window(case):
    case["window"] = 0


def bad_chunk(case):
    case["chunk"] = 0


def bad_chunk_and_window(case):
    case["chunk"] = case["window"] = 8


def bad_softcap(case):
    case["softcap"] = 0.0


def bad_sinks(case):
    case["sinks"] = torch.zeros(3)


def bad_alibi_slopes(case):
    case["alibi_slopes"] = torch.zeros(9, 1)


def bad_out(case):
    case["out"] = torch.empty(1, 9, 64)


def bad_v_cache(case):
    case["v_cache"] = case["v_cache"][:, :, :8]


def bad_backend(case):
    case["backend"] = "gpu"


WRONG = [
    (bad_head_size, "query"), (bad_head_count, "query"), (bad_query_dtype, "query"), (bad_rows, "query"),
    (bad_key_alone, "key and value"), (bad_key_shape, "key"), (bad_value_dtype, "key and value"),
    (bad_window, "window"), (bad_chunk, "chunk"), (bad_chunk_and_window, "chunk"), (bad_softcap, "softcap"),
    (bad_sinks, "sinks"), (bad_alibi_slopes, "alibi_slopes"), (bad_out, "out"), (bad_v_cache, "v_cache"),
    (bad_backend, "backend"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "name"), WRONG)
def test_a_wrong_argument_is_named(spoil, name):
    case = CASES["plain"]
    names = ("query", "key", "value", "k_cache", "v_cache", "metadata")
    arguments = dict(zip(names, case.batch(), strict=True), **case.options)
    kernels.attention_(**arguments)
    spoil(arguments)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        kernels.attention_(**arguments)


@needs_cpu
@pytest.mark.parametrize(
    ("field_name", "change", "name"),
    [
        ("block_table", lambda x: x.fill_(10**6), "block_table"),
        ("slot_mapping", lambda x: x.fill_(10**9), "slot_mapping"),
        ("seq_lens", lambda x: x.fill_(0), "seq_lens"),
        ("seq_lens", lambda x: x.fill_(10**6), "seq_lens"),
    ],
)
def test_indices_outside_the_cache_are_refused_before_anything_is_written(field_name, change, name):
    query, key, value, k_cache, v_cache, metadata = CASES["plain"].batch()
    before = k_cache.clone()
    change(getattr(metadata, field_name))
    with pytest.raises(ValueError, match=name):
        kernels.attention_(query, key, value, k_cache, v_cache, metadata, scale=0.1, backend="cpu")
    assert torch.equal(k_cache.nan_to_num(7), before.nan_to_num(7))


def test_metadata_of_the_wrong_type_is_refused():
    good = dict(
        cu_seqlens_q=torch.tensor([0, 1]).int(), seq_lens=torch.tensor([1]).int(), max_seqlen_q=1, max_seqlen_k=1,
        block_table=torch.zeros(1, 1, dtype=torch.int32), slot_mapping=torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    kernels.AttentionMetadata(**good)
    for name in ("cu_seqlens_q", "seq_lens", "block_table", "slot_mapping"):
        with pytest.raises(ValueError, match=name):
            kernels.AttentionMetadata(**{**good, name: good[name].float()})
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        kernels.AttentionMetadata(**{**good, "cu_seqlens_q": torch.tensor([0, 1, 1]).int()})
    with pytest.raises(ValueError, match="block_table"):
        kernels.AttentionMetadata(**{**good, "block_table": torch.zeros(2, 1, dtype=torch.int32)})


@pytest.mark.parametrize("bad", [dict(block_size=20), dict(block_size=0), dict(num_blocks=0), dict(dtype=torch.int16)])
def test_allocate_kv_names_a_wrong_size(bad):
    sizes = dict(num_blocks=2, num_kv_heads=2, k_head_dim=8, v_head_dim=8, block_size=16, dtype=torch.float32)
    with pytest.raises(ValueError, match=next(iter(bad))):
        kernels.allocate_kv(**{**sizes, **bad}, device="cpu")


def test_switched_off_means_the_reference(monkeypatch):
    monkeypatch.setenv("HF_PAGED_KERNELS", "off")
    assert kernels.resolve_backend("auto", "cpu") == "reference"
    assert not kernels.supports("cpu", "cpu") and "HF_PAGED_KERNELS" in kernels.why_unsupported("cpu", "cpu")
    case = CASES["plain"]
    assert torch.equal(case.run("auto"), case.run("reference"))
    with pytest.raises(ValueError, match="HF_PAGED_KERNELS"):
        case.run("cpu")
