"""Argmax and sampling without a sort.

Three kernels divide every row among programs. The scan finds the maximum; the second sums counts and weights of what lies
above a few levels below it; the third gathers the tokens above the first level that is sure to have all that will be kept, if
these are few. Then one program per row (`search`) looks for the exact cuts among those, or in the whole row, and draws.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sampling import weight_bits
from .launch import is_amd, launch, num_sms
from .search import LEVELS, best_of, chosen_level, divisor, level_keys, sample_kernel, scaled, unpacked
from .weights import key, value, weight

_MAX_SPLITS = 32  # programs per row; all that `search` sums up at once
_SCAN = 2048  # elements a program looks at together: 8 for each of 256 threads
_LEVELS = 1024  # the same with sums of 8 levels in registers, so fewer
_CANDIDATES = 4096  # gathered at most
_SEARCH = {False: 4096, True: 1024}  # of 16 warps: on AMD, whose comparisons take scalar registers, 1 for each thread
_EXACT = dict(enable_fp_fusion=False)
_COLUMNS = ["temperature", "top_k", "top_p", "min_p"]  # their alignment changes with the number of rows


@triton.jit(do_not_specialize_on_alignment=["temperature"])
def _scan_kernel(
    logits, row_stride, temperature, partial, tokens, peaks, vocab_size, chunk,
    SCALED: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The maximum of one chunk of a row, with its first index: both in an int64, key above and ~index below."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature_of_row = 1.0
    if SCALED:
        temperature_of_row = divisor(temperature, row)
    start = split * chunk
    end = tl.minimum(start + chunk, vocab_size)
    best = tl.full([TILE], -(2**63), tl.int64)
    for tile in range(start, end, TILE):
        at = tile + tl.arange(0, TILE)
        keys = key(scaled(logits + row * row_stride, at, end, temperature_of_row)).to(tl.int64)
        best = tl.maximum(best, tl.where(at < end, (keys << 32) | (0xFFFFFFFF - at.to(tl.int64)), best))
    found = tl.max(best, 0)
    if WHOLE:
        highest, index = unpacked(found)
        tl.store(tokens + row, index)
        tl.store(peaks + row, value(highest))
    else:
        tl.store(partial + row * tl.num_programs(1) + split, found)


@triton.jit(do_not_specialize=["num_splits"])
def _pick_kernel(partial, tokens, peaks, num_splits, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    highest, index = best_of(partial, row, num_splits, SPLITS)
    tl.store(tokens + row, index)
    tl.store(peaks + row, value(highest))


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["temperature"])
def _levels_kernel(
    logits, row_stride, partial, num_splits, temperature, sums, vocab_size, chunk, bits,
    LEVELS: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of one chunk of a row: how many tokens have a key of at least each level's, and their weights."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    peak = value(best_of(partial, row, num_splits, SPLITS)[0])
    if (tl.load(temperature + row) > 0.0) & (tl.abs(peak) < float("inf")):
        by, levels = divisor(temperature, row), level_keys(peak, LEVELS)[:, None]
        end = tl.minimum((split + 1) * chunk, vocab_size)
        count, mass = tl.zeros([LEVELS, TILE], tl.int32), tl.zeros([LEVELS, TILE], tl.int64)
        for tile in range(split * chunk, end, TILE):
            at = tile + tl.arange(0, TILE)
            x = scaled(logits + row * row_stride, at, end, by)
            above = (key(x)[None, :] >= levels) & (at < end)[None, :]
            count += above.to(tl.int32)
            mass += tl.where(above, weight(x, peak, bits)[None, :], 0)
        place = sums + (row * num_splits + split) * (2 * LEVELS) + tl.arange(0, LEVELS)
        tl.store(place, tl.sum(count, 1).to(tl.int64))
        tl.store(place + LEVELS, tl.sum(mass, 1))


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=_COLUMNS)
def _gather_kernel(
    logits, row_stride, partial, num_splits, temperature, top_k, top_p, min_p, sums, candidates,
    vocab_size, chunk, bits,
    LEVELS: tl.constexpr, SPLITS: tl.constexpr, CANDIDATES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One chunk's candidates (logits after temperature, and their ids), behind those of the chunks before."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    peak = value(best_of(partial, row, num_splits, SPLITS)[0])
    if (tl.load(temperature + row) > 0.0) & (tl.abs(peak) < float("inf")):
        k, p, share = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        level, lowest, number, _, _ = chosen_level(
            sums, row, num_splits, k, p, share, peak, vocab_size, bits, LEVELS, SPLITS
        )
        if number <= CANDIDATES:
            before = tl.arange(0, SPLITS)
            counts = sums + (row * num_splits + before) * (2 * LEVELS) + level
            start = tl.sum(tl.load(counts, mask=before < split, other=0), 0)
            by = divisor(temperature, row)
            end = tl.minimum((split + 1) * chunk, vocab_size)
            for tile in range(split * chunk, end, TILE):
                at = tile + tl.arange(0, TILE)
                x = scaled(logits + row * row_stride, at, end, by)
                above = (key(x) >= lowest) & (at < end)
                place = candidates + row * (2 * CANDIDATES) + start + tl.cumsum(above.to(tl.int32), 0) - 1
                tl.store(place, x.to(tl.int32, bitcast=True), mask=above)
                tl.store(place + CANDIDATES, at, mask=above)
                start += tl.sum(above.to(tl.int32), 0)


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See `sampling.argmax`. Few rows are split over several programs each, and a second kernel picks the best."""
    tokens, peaks = _outputs(logits)
    num_splits, chunk = _division(logits)
    partial = _scan(logits, None, num_splits, chunk, tokens, peaks)
    if num_splits > 1:
        launch(_pick_kernel, (len(logits),), partial, tokens, peaks, num_splits, SPLITS=_MAX_SPLITS, num_warps=1)
    return tokens, peaks


def sample(logits, temperature, top_k, top_p, min_p, uniforms, seeds, positions) -> tuple[Tensor, Tensor]:
    """See `sampling.sample`."""
    tokens, peaks = _outputs(logits)
    num_splits, chunk = _division(logits)
    count, vocab_size, device = *logits.shape, logits.device
    bits, most = weight_bits(vocab_size), _tile(vocab_size, _CANDIDATES)
    partial = _scan(logits, temperature, num_splits, chunk, tokens, peaks, whole=False)
    sums = torch.empty(count, num_splits, 2, LEVELS, dtype=torch.int64, device=device)
    candidates = torch.empty(count, 2, most, dtype=torch.int32, device=device)
    rows, options = (logits, logits.stride(0), partial, num_splits), (temperature, top_k, top_p, min_p)
    sizes = dict(LEVELS=LEVELS, SPLITS=_MAX_SPLITS)
    launch(_levels_kernel, (count, num_splits), *rows, temperature, sums, vocab_size, chunk, bits, **sizes,
           TILE=_tile(vocab_size, _LEVELS), num_warps=8, **_EXACT)  # fmt: skip
    launch(_gather_kernel, (count, num_splits), *rows, *options, sums, candidates, vocab_size, chunk, bits,
           **sizes, CANDIDATES=most, TILE=_tile(vocab_size, _SCAN), num_warps=8, **_EXACT)  # fmt: skip
    counter = uniforms is None
    source = (seeds, seeds, positions) if counter else (uniforms, top_k, top_k)  # those of the other kind are not read
    launch(sample_kernel, (count,), *rows, *options, *source, sums, candidates, tokens, peaks, chunk,
           vocab_size=vocab_size, bits=bits, **sizes, CANDIDATES=most, COUNTER=counter, TILE=_tile(vocab_size, _SEARCH[is_amd(device)]),
           num_warps=16, **_EXACT)  # fmt: skip
    return tokens, peaks


def _outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    count, device = len(logits), logits.device
    return torch.empty(count, dtype=torch.int64, device=device), torch.empty(count, dtype=torch.float32, device=device)


def _division(logits: Tensor) -> tuple[int, int]:
    """(programs per row, elements of each): enough programs in all to have four for every multiprocessor."""
    count, vocab_size = logits.shape
    tile = _tile(vocab_size, _SCAN)
    wanted = min(triton.cdiv(4 * num_sms(logits.device), count), _MAX_SPLITS)
    chunk = triton.cdiv(triton.cdiv(vocab_size, wanted), tile) * tile
    return triton.cdiv(vocab_size, chunk), chunk


def _scan(logits, temperature, num_splits: int, chunk: int, tokens, peaks, whole: bool = True) -> Tensor:
    """Packed maxima int64 [R, splits]; with one split per row and `whole`, tokens and peaks instead."""
    count, vocab_size = logits.shape
    partial = torch.empty(count, num_splits, dtype=torch.int64, device=logits.device)
    launch(_scan_kernel, (count, num_splits), logits, logits.stride(0), peaks if temperature is None else temperature,
           partial, tokens, peaks, vocab_size, chunk, SCALED=temperature is not None,
           WHOLE=whole and num_splits == 1, TILE=_tile(vocab_size, _SCAN), num_warps=8, **_EXACT)  # fmt: skip
    return partial


def _tile(vocab_size: int, most: int) -> int:
    return min(most, triton.next_power_of_2(vocab_size))
