"""Attention: decode as a share of copy bandwidth, prefill in TFLOP/s, beside the peers that are installed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_paged_kernels import AttentionMetadata, ops

from . import peers
from .batches import Heads, metadata, randn
from .checking import BOUNDS, compare
from .models import ModelShape
from .report import Clock, Target
from .session import Session
from .timing import Timing, measure

BLOCK_SIZE = 64
DECODE = [(8, 4096), (1, 1024), (64, 1024), (1, 32768), (256, 1024), (8, 32768), (1, 4096), (64, 4096), (256, 4096),
          (8, 1024), (64, 32768), (256, 32768)]  # (sequences, context), the telling ones first  # fmt: skip
LATENT_DECODE = [(8, 4096), (64, 4096), (1, 32768), (1, 1024)]
DEEPSEEK_V3, TINY_LATENT = Heads(128, 1, 576, 512), Heads(4, 1, 40, 32)
PREFILL = [4096, 1024, 32768, 8192, 2048, 16384]
TINY_DECODE, TINY_PREFILL = [(1, 32), (2, 64)], [32]
DECODE_TARGET, DECODE_TARGET_FROM = Target(0.85), 8 * 4096  # tokens in the cache
PREFILL_TARGET = Target(0.75)  # of FlashAttention-3
PEER_TOKENS = 2**18  # peers read copies of the cache: not of larger ones
FLEX_LENGTH, FLEX_SECONDS = 8192, 20  # its compilation takes a while: one length, where there is the time


def decode(session: Session, clock: Clock) -> None:
    for kv_dtype in (session.dtype, torch.float8_e4m3fn):
        backend = ops.resolve_backend(session.backend, session.device)
        if reason := ops.why_unsupported(backend, session.device, kv_dtype=kv_dtype):
            session.report.skip(f"decode attention, {kv_dtype}", reason)
            continue
        for shape in session.shapes.values():
            for count, length in TINY_DECODE if session.tiny else DECODE:
                name = f"{count} x {length}"
                num_bytes = kv_bytes(shape, count * length, kv_dtype)
                if clock.left < 0:
                    return session.report.skip(f"decode attention from {shape.name} {name} on", "out of time")
                if not session.fits(num_bytes * (3 if count * length <= PEER_TOKENS else 1.2)):
                    session.report.skip(f"decode attention {shape.name} {name}", "it does not fit into memory")
                    continue
                session.report.attempt(
                    f"decode attention {shape.name} {name} {kv_dtype}",
                    lambda: _decode_case(session, shape, count, length, kv_dtype),  # noqa: B023
                )


def _decode_case(session: Session, shape: ModelShape, count: int, length: int, kv_dtype: torch.dtype) -> None:
    candidates, sets = decode_candidates(
        session, shape, count, length, kv_dtype, others=kv_dtype == session.dtype and count * length <= PEER_TOKENS
    )
    must_agree(candidates, session.dtype)
    timings = measure(candidates, sets, session.device, rounds=session.rounds)
    aimed = kv_dtype == torch.bfloat16 and count * length >= DECODE_TARGET_FROM
    num_bytes = kv_bytes(shape, count * length, kv_dtype)
    for system, timing in timings.items():
        shares = [num_bytes / seconds / session.copy_bandwidth for seconds in timing.samples]
        session.report.add(
            "decode attention", f"{count} x {length}", system, "share of copy bandwidth", "", shares,
            target=DECODE_TARGET if aimed and system == "hf_paged" else None, model=shape.name,
            dtype=str(kv_dtype).removeprefix("torch."), microseconds=timing.median * 1e6, graphed=timing.graphed,
        )  # fmt: skip


def kv_bytes(shape: ModelShape, tokens: int, kv_dtype: torch.dtype) -> int:
    """Bytes of one layer's keys and values, with the float32 scale of each where they are 8 bits wide."""
    one = shape.head_dim * kv_dtype.itemsize + (4 if kv_dtype.itemsize == 1 else 0)
    return 2 * tokens * shape.num_kv_heads * one


def decode_candidates(
    session: Session, shape: ModelShape, count: int, length: int, kv_dtype: torch.dtype, others: bool = False
) -> tuple[dict[str, Callable[[int], object]], int]:
    """Ours, and with `others` the peers', on pages in random order; every input set has pages of its own."""
    sets, device = session.sets(kv_bytes(shape, count * length, kv_dtype)), session.device
    step = metadata([1] * (count * sets), [length] * (count * sets), BLOCK_SIZE, device)
    caches, scales = filled_cache(session, shape, sets * count * -(-length // BLOCK_SIZE), kv_dtype)
    tables = [table.contiguous() for table in step.block_table.view(sets, count, -1)]
    kind = dict(dtype=session.dtype, device=device)
    queries = [randn(count, shape.num_heads, shape.head_dim, seed=i, **kind) for i in range(sets)]
    steps = [_decode_step(table, length) for table in tables]
    scale = shape.head_dim**-0.5

    def ours(i: int):
        return ops.attention_(
            queries[i], None, None, *caches, steps[i], scale=scale, **scales, backend=session.backend
        )

    runs = {"hf_paged": ours}
    return runs | (peers.decode(queries, caches[0].mT, caches[1], tables, length) if others else {}), sets


def _decode_step(table: torch.Tensor, length: int) -> AttentionMetadata:
    """A token each for the sequences of a table [B, blocks], whose keys and values are written already."""
    count, device = len(table), table.device
    return AttentionMetadata(
        cu_seqlens_q=torch.arange(count + 1, dtype=torch.int32, device=device),
        seq_lens=torch.full((count,), length, dtype=torch.int32, device=device),
        block_table=table,
        slot_mapping=torch.full((count,), -1, dtype=torch.int64, device=device),
        max_seqlen_q=1,
        max_seqlen_k=length,
        num_decodes=count,
    )


def latent(session: Session, clock: Clock) -> None:
    """Decodes of multi-head latent attention: one latent a token, read once, for all query heads."""
    if ops.resolve_backend(session.backend, session.device) != "triton":
        return session.report.skip("latent attention", "only the Triton kernels keep one copy of the latents")
    for count, length in TINY_DECODE if session.tiny else LATENT_DECODE:
        if clock.left < 0:
            return session.report.skip(f"latent attention from {count} x {length} on", "out of time")
        session.report.attempt(
            f"latent attention {count} x {length}",
            lambda: _latent_case(session, TINY_LATENT if session.tiny else DEEPSEEK_V3, count, length),  # noqa: B023
        )


def _latent_case(session: Session, heads: Heads, count: int, length: int) -> None:
    num_bytes = count * length * heads.key_dim * session.dtype.itemsize
    sets = session.sets(num_bytes)
    step = metadata([1] * (count * sets), [length] * (count * sets), BLOCK_SIZE, session.device)
    kind = dict(dtype=session.dtype, device=session.device)
    caches = ops.allocate_kv(
        sets * count * -(-length // BLOCK_SIZE), 1, heads.key_dim, heads.value_dim, BLOCK_SIZE, **kind,
        values_in_keys=True, backend=session.backend,
    )  # fmt: skip
    caches[0].normal_()
    steps = [_decode_step(table.contiguous(), length) for table in step.block_table.view(sets, count, -1)]
    queries = [randn(count, heads.query, heads.key_dim, seed=i, **kind) for i in range(sets)]
    scale = heads.key_dim**-0.5

    def ours(i: int):
        return ops.attention_(queries[i], None, None, *caches, steps[i], scale=scale, backend=session.backend)

    timing = measure({"hf_paged": ours}, sets, session.device, rounds=session.rounds)["hf_paged"]
    flops = 2 * count * length * heads.query * (heads.key_dim + heads.value_dim)
    shares = [num_bytes / seconds / session.copy_bandwidth for seconds in timing.samples]
    session.report.add(
        "latent attention", f"{count} x {length}", "hf_paged", "share of copy bandwidth", "", shares,
        model=f"{heads.query} heads, {heads.key_dim}", dtype=session.dtype_name, microseconds=timing.median * 1e6,
        tflops=flops / timing.median / 1e12, graphed=timing.graphed,
    )  # fmt: skip


def filled_cache(session: Session, shape: ModelShape, blocks: int, kv_dtype: torch.dtype):
    """A cache of random keys and values, and the keyword arguments that tell its scales."""
    caches = ops.allocate_kv(
        blocks, shape.num_kv_heads, shape.head_dim, shape.head_dim, BLOCK_SIZE, kv_dtype, session.device,
        backend=session.backend,
    )  # fmt: skip
    piece = 4096  # blocks at a time: of the wider numbers that are cast there should be few
    for cache in caches:
        for part in cache.split(piece):
            part.copy_(torch.randn(part.shape, dtype=session.dtype, device=session.device))
    if kv_dtype == session.dtype:
        return caches, {}
    k_scale, v_scale = (scale.fill_(1) for scale in ops.allocate_scales(caches[1]))
    return caches, {"k_scale": k_scale, "v_scale": v_scale}


def prefill(session: Session, clock: Clock) -> None:
    for shape in session.shapes.values():
        for length in TINY_PREFILL if session.tiny else PREFILL:
            if clock.left < 0:
                return session.report.skip(f"prefill attention from {shape.name} {length} on", "out of time")
            session.report.attempt(
                f"prefill attention {shape.name} {length}",
                lambda: _prefill_case(session, shape, length),  # noqa: B023
            )
    if session.device.type == "cuda" and clock.left > FLEX_SECONDS:
        shape = session.shapes["llama-8b"]
        session.report.attempt("FlexAttention", lambda: _prefill_case(session, shape, FLEX_LENGTH, flex=True))


def _prefill_case(session: Session, shape: ModelShape, length: int, flex: bool = False) -> None:
    candidates, sets = prefill_candidates(session, shape, length)
    queries, keys, values = candidates.pop("inputs")
    candidates |= peers.prefill(queries, keys, values, flex=flex)
    must_agree(candidates, session.dtype)
    timings = measure(candidates, sets, session.device, rounds=session.rounds)
    flops = 2 * length * length * shape.num_heads * shape.head_dim  # the half that causality leaves of 4 n^2 H D
    common = dict(model=shape.name, dtype=session.dtype_name)
    for system, timing in timings.items():
        rates = [flops / seconds / 1e12 for seconds in timing.samples]
        session.report.add(
            "prefill attention", str(length), system, "rate", "TFLOP/s", rates, graphed=timing.graphed, **common
        )
    if peers.FA3 in timings:
        session.report.add("prefill attention", str(length), "hf_paged", f"share of {peers.FA3}", "",
                           ratios(timings[peers.FA3], timings["hf_paged"]), target=PREFILL_TARGET, baseline=peers.FA3,
                           **common)  # fmt: skip


def must_agree(candidates: dict[str, Callable[[int], torch.Tensor]], dtype: torch.dtype) -> None:
    """Raise AssertionError where a peer's result is another than ours: what is measured must be the same work."""
    results = {name: run(0) for name, run in candidates.items()}
    ours = results.pop("hf_paged")
    for name, result in results.items():
        case = compare(name, ours, result, dtype, 2 * BOUNDS[dtype])  # two roundings: both are in this dtype
        assert case.used <= 1, f"hf_paged and {name} differ by {case.error:.2g}"


def ratios(slow: Timing, fast: Timing) -> list[float]:
    """How many times faster `fast` is, round by round."""
    return [a / b for a, b in zip(slow.samples, fast.samples, strict=True)]


def prefill_candidates(session: Session, shape: ModelShape, length: int) -> tuple[dict, int]:
    """Ours on one whole prompt whose keys and values are in pages already; "inputs" are the same as tensors."""
    sets = session.sets(4 * length * shape.num_heads * shape.head_dim)
    step = metadata([length], [length], BLOCK_SIZE, session.device)
    caches, _ = filled_cache(session, shape, step.block_table.shape[1], session.dtype)
    queries = [
        randn(length, shape.num_heads, shape.head_dim, dtype=session.dtype, device=session.device, seed=i)
        for i in range(sets)
    ]
    key, value = ops.gather_kv(*caches, step.block_table[0], length)
    scale = shape.head_dim**-0.5

    def ours(i: int):
        return ops.attention_(queries[i], None, None, *caches, step, scale=scale, backend=session.backend)

    return {"hf_paged": ours, "inputs": (queries, [key.contiguous()] * sets, [value.contiguous()] * sets)}, sets
