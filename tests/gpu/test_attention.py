"""Paged attention on Triton against a dense float64 computation, and on quantized caches against the reference."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from attention_cases import Case

from hf_paged_kernels import ops

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {torch.float32: 4e-6, BF16: 1.2e-2, FP16: 1.5e-3}
# (new, total) tokens: decodes first, then prompts, one of them in its second chunk, one long enough for two tiles
MIXED = [(1, 17), (1, 90), (50, 50), (3, 70), (5, 5)]
IMAGES = {2: [(3, 45)], 3: [(67, 70)], 4: [(0, 2), (2, 4)]}
DECODES = [(1, 1), (1, 16), (1, 150), (1, 33)]
DRAFTS = [(4, 4), (1, 40), (8, 90), (3, 64)]


def case(device, **sizes):
    return Case(**{"heads": (4, 2), "lengths": MIXED, "layout": "triton", **sizes}, device=device)


CASES = {
    "plain": dict(),
    "decodes": dict(lengths=DECODES),
    "drafts": dict(lengths=DRAFTS),
    "one_prompt": dict(lengths=[(100, 100)], heads=(2, 1)),
    "group_of_3": dict(heads=(9, 3)),
    "group_of_7": dict(heads=(7, 1), lengths=DRAFTS),
    "group_of_71": dict(heads=(71, 1), lengths=[(1, 40), (3, 60)]),
    "multi_head": dict(heads=(3, 3), lengths=DECODES),
    "dim_16": dict(k_dim=16, v_dim=16),
    "dim_80": dict(k_dim=80, v_dim=80),
    "dim_96_decodes": dict(k_dim=96, v_dim=96, lengths=DECODES),
    "dim_128_bf16": dict(k_dim=128, v_dim=128, dtype=BF16, cache_dtype=BF16),
    "dim_256_fp16": dict(k_dim=256, v_dim=256, dtype=FP16, cache_dtype=FP16, heads=(4, 1)),
    "dim_512_bf16": dict(k_dim=512, v_dim=512, dtype=BF16, cache_dtype=BF16, heads=(2, 1), lengths=[(1, 9), (40, 40)]),
    "dims_differ": dict(k_dim=48, v_dim=20),
    "window_1": dict(window=1),
    "window_7": dict(window=7),
    "window_40": dict(window=40, block_size=32),
    "window_40_drafts": dict(window=40, lengths=DRAFTS, block_size=64),
    "window_beyond": dict(window=300, lengths=DECODES),
    "chunk_24": dict(chunk=24),
    "chunk_32_drafts": dict(chunk=32, lengths=DRAFTS, block_size=32),
    "softcap": dict(softcap=5.0),
    "sinks": dict(sinks=True),
    "alibi": dict(alibi=True),
    "images": dict(images=IMAGES),
    "images_window": dict(images=IMAGES, window=20, sinks=True, heads=(8, 2), block_size=64),
    "images_few_tokens": dict(images={0: [(0, 4)], 2: [(83, 89)]}, lengths=DRAFTS),
    "images_bf16": dict(images=IMAGES, window=30, dtype=BF16, cache_dtype=BF16, k_dim=128, v_dim=128, softcap=20.0),
    "images_beyond_a_tile": dict(images={0: [(2, 150)]}, lengths=[(160, 160)], heads=(2, 1)),
    "images_int8_cache": dict(images=IMAGES, cache_dtype=torch.int8, window=40),
    "gpt_oss": dict(heads=(8, 1), window=32, sinks=True, dtype=BF16, cache_dtype=BF16, block_size=64),
    "gemma": dict(window=64, softcap=20.0, k_dim=128, v_dim=128, block_size=64),
    "everything": dict(window=50, softcap=8.0, sinks=True, alibi=True, k_dim=24, v_dim=40, block_size=48),
    "block_32": dict(block_size=32),
    "block_64": dict(block_size=64),
    "block_128_decodes": dict(block_size=128, lengths=DECODES),
    "bf16_cache": dict(cache_dtype=BF16),
    "bf16_model": dict(dtype=BF16, cache_dtype=BF16),
    "fp16_model_bf16_cache": dict(dtype=FP16, cache_dtype=BF16),
    "cpu_layout": dict(layout="reference"),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_float64(device, name):
    it = case(device, **CASES[name])
    got, want = it.run("triton"), it.dense()
    assert got.dtype == it.dtype and got.shape == want.shape
    tolerance = TOLERANCE[it.dtype]
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["decodes", "drafts", "plain", "sinks", "window_40", "everything"])
def test_many_splits_and_the_lse_without_the_sink(device, name):
    """The bound on the lengths that a captured launch has asks for more splits than most sequences have tiles."""
    it = case(device, **CASES[name])
    *rest, metadata = it.batch()
    metadata.max_seqlen_k = 1800
    lse = torch.full(rest[0].shape[:2], float("nan"), device=device)
    out = torch.full((*rest[0].shape[:2], it.v_dim), float("nan"), device=device)
    got = ops.attention_(*rest, metadata, **it.options, out=out, lse=lse, backend="triton")
    want, want_lse = it.dense_with_lse()
    assert got is out
    torch.testing.assert_close(out.double(), want, atol=4e-6, rtol=4e-6)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=2e-6)
    reference_lse = torch.empty_like(lse)
    ops.attention_(*rest, metadata, **it.options, lse=reference_lse, backend="reference")
    torch.testing.assert_close(reference_lse, lse, atol=2e-5, rtol=2e-6)


def test_results_may_be_float32_for_narrow_queries(device):
    it = case(device, dtype=BF16, cache_dtype=BF16)
    out = torch.empty(len(it.dense()), 4, 64, device=device)
    for backend in ("triton", "reference"):
        got = it.run(backend, out=out)
        assert got is out
        torch.testing.assert_close(out.double(), it.dense(), atol=6e-3, rtol=6e-3)


@pytest.mark.parametrize("options", [dict(), dict(window=40, sinks=True)])
def test_split_size_gives_the_same_bits_in_any_batch(device, options):
    lengths = [(1, 200), (1, 16), (1, 77), (30, 90), (20, 20)]
    it = case(device, lengths=lengths, dtype=BF16, cache_dtype=BF16, **options)
    rows = [0, 1, 2, 3, 33, 53]
    together = it.run("triton", split_size=64)
    for seq, (new, _) in enumerate(lengths):
        alone = it.run("triton", [(seq, 0, new)], block_seed=seq, split_size=64)
        assert torch.equal(alone, together[rows[seq] : rows[seq + 1]]), seq
    three = it.run("triton", [(2, 0, 1), (0, 0, 1), (1, 0, 1)], split_size=64)
    assert torch.equal(three, together[[2, 0, 1]])


def test_padding_gives_zeros_and_is_written_nowhere(device):
    it = case(device, lengths=[(1, 40), (1, 9)], sinks=True)
    query, key, value, k_cache, v_cache, metadata = it.batch()
    padded = ops.AttentionMetadata(
        cu_seqlens_q=torch.arange(5, dtype=torch.int32, device=device),
        seq_lens=torch.cat([metadata.seq_lens, metadata.seq_lens.new_zeros(2)]),
        block_table=torch.cat([metadata.block_table, torch.full_like(metadata.block_table, -1)]),
        slot_mapping=torch.cat([metadata.slot_mapping, metadata.slot_mapping.new_full((2,), -1)]),
        max_seqlen_q=1, max_seqlen_k=600, num_decodes=4,
    )  # fmt: skip
    wide = [torch.cat([x, torch.full_like(x, float("nan"))]) for x in (query, key, value)]
    for backend in ("triton", "reference"):
        caches, expected = (k_cache.clone(), v_cache.clone()), (k_cache.clone(), v_cache.clone())
        ops.store_kv(key, value, *expected, metadata.slot_mapping, backend="reference")
        lse = torch.empty(4, 4, device=device)
        out = ops.attention_(*wide, *caches, padded, **it.options, lse=lse, backend=backend)
        torch.testing.assert_close(out[:2].double(), it.dense(), atol=4e-6, rtol=4e-6)
        assert (out[2:] == 0).all() and (lse[2:] == -float("inf")).all()
        for cache, want in zip(caches, expected):
            assert torch.equal(cache.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("lengths", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("query_dtype", [torch.float32, BF16])
def test_quantized_caches(device, dtype, query_dtype, lengths):
    options = dict(window=40) if lengths is MIXED else dict(softcap=10.0, sinks=True)
    it = case(device, dtype=query_dtype, cache_dtype=dtype, lengths=lengths, k_dim=40, v_dim=24, **options)
    results = []
    for backend in ("reference", "triton"):
        query, *rest = it.batch()
        out = torch.empty(*query.shape[:2], it.v_dim, device=device)
        ops.attention_(query, *rest, **it.options, **it.scales, out=out, backend=backend)
        results.append((out, *rest[2:4], *it.scales.values()))
    (want, *want_cache), (got, *got_cache) = results
    for a, b in zip(got_cache, want_cache):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    tolerance = 4e-6 if query_dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    # Quantizing costs no more than the type's precision: half a step of 127, or three bits of mantissa.
    exact = replace(it, cache_dtype=torch.float32).dense()
    assert (got.double() - exact).abs().mean() < (0.02 if dtype == torch.int8 else 0.06) * exact.abs().mean()


def test_strided_inputs(device):
    it = case(device, dtype=BF16, cache_dtype=BF16)
    query, key, value, *rest = it.batch()
    want = it.run("triton")
    merged = torch.cat([query.flatten(1), key.flatten(1), value.flatten(1)], 1)
    query, key, value = (part.unflatten(1, (-1, 64)) for part in merged.split([256, 128, 128], 1))
    assert torch.equal(ops.attention_(query, key, value, *rest, **it.options, backend="triton"), want)
    *_, metadata = it.batch()
    query, key, value = (x.mT.contiguous().mT for x in (query, key, value))
    got = ops.attention_(query, key, value, *rest[:2], metadata, **it.options, backend="triton")
    assert torch.equal(got, want)


def test_caches_that_are_slices_and_no_new_keys(device):
    it = case(device)
    query, key, value, k_cache, v_cache, metadata = it.batch()
    want = ops.attention_(query, key, value, k_cache, v_cache, metadata, **it.options, backend="triton")
    for dim in (1, 2):  # within a block, within a head
        layers = [torch.stack([torch.full_like(cache, float("nan")), cache], dim) for cache in (k_cache, v_cache)]
        views = [layer.select(dim, 1) for layer in layers]
        got = ops.attention_(query, None, None, *views, metadata, **it.options, backend="triton")
        assert torch.equal(got, want)


def test_a_nan_a_row_sees_reaches_it_and_no_other_sequence(device):
    it = case(device, lengths=[(1, 100), (1, 40), (9, 30), (9, 20)])
    query, key, value, k_cache, v_cache, metadata = it.batch()
    clean = it.run("triton")
    k_cache[metadata.block_table[0, 1].item(), :, :, 3] = float("nan")  # position 19 of sequence 0
    k_cache[metadata.block_table[2, 0].item(), :, :, 5] = float("nan")  # position 5 of sequence 2
    got = ops.attention_(query, key, value, k_cache, v_cache, metadata, **it.options, backend="triton")
    assert got[0].isnan().all() and got[2:11].isnan().all()
    assert torch.equal(got[1], clean[1]) and torch.equal(got[11:], clean[11:])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_merge_states(device, dtype):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(11, 5, 3, 40, generator=generator).to(device, dtype)
    lses = (torch.randn(11, 5, 3, generator=generator) * 4).to(device)
    sinks = torch.randn(3, generator=generator).to(device)
    gone = torch.rand(11, 5, 3, generator=generator) < 0.3
    gone[:, 2] = True  # a row that no part has keys for
    lses[gone], parts[gone] = -float("inf"), float("nan")
    for sink in (None, sinks):
        results = []
        for backend in ("triton", "reference"):
            out, lse = torch.empty(5, 3, 40, device=device), torch.empty(5, 3, device=device)
            assert ops.merge_states(parts, lses, sinks=sink, out=out, lse=lse, backend=backend) is out
            results.append((out, lse))
        weights = lses.double().exp()
        total = weights.sum(0)
        want = (parts.double().masked_fill(gone.to(device)[..., None], 0) * weights[..., None]).sum(0)
        want = want / (total + (0 if sink is None else sink.double().exp())).clamp(min=1e-300)[..., None]
        for out, lse in results:
            torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-6)
            torch.testing.assert_close(lse.double(), total.log(), atol=2e-6, rtol=2e-6)


def test_attention_to_two_halves_merged_is_attention_to_all(device):
    """As with a shared prefix: one part over the first 32 keys, another over the rest, the sink at the merge."""
    it = case(device, lengths=[(1, 70), (1, 50)], sinks=True)
    query, key, value, *caches, metadata = it.batch()
    want = ops.attention_(query, key, value, *caches, metadata, **it.options, backend="triton")
    options = {**it.options, "sinks": None}
    parts, lses = torch.empty(2, 2, 4, 64, device=device), torch.empty(2, 2, 4, device=device)
    for i, (lens, table) in enumerate([([32, 32], metadata.block_table[:, :2]),
                                       ([38, 18], metadata.block_table[:, 2:])]):  # fmt: skip
        half = replace(metadata, seq_lens=torch.tensor(lens, device=device).int(), block_table=table.contiguous())
        ops.attention_(query, None, None, *caches, half, **options, out=parts[i], lse=lses[i], backend="triton")
    got = ops.merge_states(parts, lses, sinks=it.options["sinks"], backend="triton")
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("seed", range(8))
def test_random_batches(device, seed):
    random = Random(seed)
    lengths = []
    for _ in range(random.randint(1, 4)):
        new = random.choice([1, 1, random.randint(1, 9), random.randint(1, 60)])
        lengths.append((new, new + random.choice([0, random.randint(0, 20), random.randint(0, 150)])))
    if random.random() < 0.7:
        lengths.sort(key=lambda length: length[0] != 1)  # as the scheduler has it; not everybody must
    span = {random.choice(["none", "window", "chunk"]): random.randint(1, 100)}
    span.pop("none", None)
    kv_heads = random.randint(1, 3)
    it = case(
        device, lengths=lengths, heads=(kv_heads * random.randint(1, 5), kv_heads), k_dim=random.randint(1, 100),
        v_dim=random.randint(1, 70), block_size=random.choice([16, 32, 48, 64]), sinks=random.random() < 0.3,
        alibi=random.random() < 0.3, softcap=random.choice([None, None, 4.0]), seed=seed, **span,
    )  # fmt: skip
    options = random.choice([dict(), dict(split_size=random.randint(1, 100))])
    got, want = it.run("triton", **options), it.dense()
    torch.testing.assert_close(got.double(), want, atol=6e-6, rtol=6e-6)


def test_what_a_backend_cannot_do_is_named(device):
    it = case(device, k_dim=520, v_dim=16, lengths=[(1, 3)])
    with pytest.raises(ValueError, match="head sizes 520 and 16; the Triton kernels take at most 512"):
        it.run("triton")
    assert "at most 512" in ops.why_unsupported("triton", device, head_dim=520)
    it = Case(lengths=[(1, 3)])
    if ops.supports("cpu", "cpu"):
        with pytest.raises(ValueError, match="lse must be None"):
            it.run("cpu", lse=torch.empty(1, 9))
    with pytest.raises(ValueError, match="lse must be contiguous float32"):
        it.run("reference", lse=torch.empty(1, 9, dtype=BF16))
    with pytest.raises(ValueError, match="split_size"):
        it.run("reference", split_size=0)
    int8 = Case(lengths=[(1, 3)], cache_dtype=torch.int8, layout="reference")
    query, *rest = int8.batch()
    with pytest.raises(ValueError, match="k_scale and v_scale must be given"):
        ops.attention_(query, *rest, **int8.options, backend="reference")
    with pytest.raises(ValueError, match="v_scale must be float32"):
        ops.attention_(query, *rest, **int8.options, **{**int8.scales, "v_scale": None}, backend="reference")
    *_, metadata = it.batch()
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="num_decodes"):
            replace(metadata, num_decodes=wrong)
    two = Case(lengths=[(3, 3), (1, 5)]).batch()[-1]
    with pytest.raises(ValueError, match="num_decodes"):
        replace(two, num_decodes=2)
