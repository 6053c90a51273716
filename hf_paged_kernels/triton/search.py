"""The exact cuts of top-k and top-p, and the draw: one program per row.

A row's tokens are kept from some logit upwards: the k-th largest (top-k), then the smallest whose mass, together with all
that is above it, reaches a target (top-p). Both are "the largest key t with F(t) >= target", F(t) = sum of f over tokens
with keys >= t, and f = 1 or the token's integer weight. Four-way search over keys: each pass evaluates F at three pivots,
and shrinks the bracket to the keys that occur in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .weights import NAN_KEY, NEG_INF_KEY, counter_uniform, key, value, weight

LEVELS = 8


@triton.jit
def scaled(logits, at, vocab_size, temperature):
    x = tl.load(logits + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, temperature)


@triton.jit
def divisor(temperature, row):
    """The row's temperature in fp32; greedy rows are divided by 1, which changes nothing."""
    value = tl.load(temperature + row).to(tl.float32)
    return tl.where(value == 0.0, 1.0, value)


@triton.jit
def unpacked(best):
    """(key, index) of a packed maximum, see `_scan_kernel`."""
    return (best >> 32).to(tl.int32), 0xFFFFFFFF - (best & 0xFFFFFFFF)


@triton.jit
def best_of(partial, row, num_splits, SPLITS: tl.constexpr):
    at = tl.arange(0, SPLITS)
    found = tl.load(partial + row * num_splits + at, mask=at < num_splits, other=-(2**63))
    return unpacked(tl.max(found, 0))


@triton.jit
def level_keys(peak, LEVELS: tl.constexpr):
    """Keys of 1, 2.5, 4.5, 7, 10, 13.5 and 17.5 below the peak, and one that every token reaches."""
    j = tl.arange(0, LEVELS)
    return tl.where(j == LEVELS - 1, NEG_INF_KEY, key(peak - ((j + 1) * (j + 4)).to(tl.float32) * 0.25))


@triton.jit
def wanted_mass(total, p):
    """What top-p keeps at least: it may cut (1 - p) of the total, but never all."""
    return tl.maximum(total - ((1.0 - p) * total.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def least_weight(share, bits):
    """The smallest weight that min-p keeps."""
    return tl.ceil(share * (tl.full([], 1, tl.int64) << bits).to(tl.float64)).to(tl.int64)


@triton.jit
def chosen_level(
    sums, row, num_splits, k, p, share, peak, vocab_size, bits, LEVELS: tl.constexpr, SPLITS: tl.constexpr
):
    """The first level above which is all that may be kept: (level, its key, tokens there, their mass, the row's mass).

    sums: int64 [R, splits, 2, LEVELS], counts and masses above each level.
    """
    split, j = tl.arange(0, SPLITS)[:, None], tl.arange(0, LEVELS)
    at = sums + (row * num_splits + split) * (2 * LEVELS) + j[None, :]
    count = tl.sum(tl.load(at, mask=split < num_splits, other=0), 0)
    mass = tl.sum(tl.load(at + LEVELS, mask=split < num_splits, other=0), 0)
    total, keys = tl.max(mass, 0), level_keys(peak, LEVELS)
    enough = j == LEVELS - 1
    if (k > 0) & (k < vocab_size):
        enough = enough | (count >= k)
    elif p < 1.0:
        enough = enough | (mass >= wanted_mass(total, p))
    elif share > 0.0:  # below a level weights are its own at most, but for the last places of exp
        own = weight(value(keys), peak, bits)
        enough = enough | (own + (own >> 20) < least_weight(share, bits))
    level = tl.min(tl.where(enough, j, LEVELS), 0)
    here = j == level
    lowest = tl.max(tl.where(here, keys, NEG_INF_KEY), 0)
    return level, lowest, tl.sum(tl.where(here, count, 0), 0), tl.sum(tl.where(here, mass, 0), 0), total


@triton.jit
def _x(logits, candidates, few, at, number, by):
    """Logits after temperature: of the candidates, where they are few, else of the row."""
    whole = tl.load(logits + at, mask=at < tl.where(few, 0, number), other=float("-inf")).to(tl.float32)
    gathered = tl.load(candidates + at, mask=at < tl.where(few, number, 0), other=0).to(tl.float32, bitcast=True)
    gathered = tl.where(at < number, gathered, float("-inf"))
    return tl.where(few, gathered, tl.div_rn(whole, by))


@triton.jit
def _search(
    logits, candidates, few, number, by, peak, bits, low, high, mass, target,
    MASS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(largest key t in [low, high) with F(t) >= target, F(t)), given that F(low) = mass >= target > F(high).

    Pivots are equally spaced among values and among keys by turns: the former is quick on logits as they come, the latter
    bounds the number of passes (16 of each would do for all 2^32 keys).
    """
    turn = 0
    while low < high - 1:
        step = ((high.to(tl.int64) - low.to(tl.int64)) // 4).to(tl.int32)
        a, b, c = low + step, low + 2 * step, low + 3 * step
        if turn % 2 == 0:
            top = value(high - 1)
            part = (top - tl.maximum(value(low), top - 64.0)) * 0.25
            a, b, c = key(top - 3 * part), key(top - 2 * part), key(top - part)
        turn += 1
        a = tl.minimum(tl.maximum(a, low + 1), high - 1)
        b = tl.minimum(tl.maximum(b, low + 1), high - 1)
        c = tl.minimum(tl.maximum(c, low + 1), high - 1)
        above_a, above_b, above_c = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
        least, most = tl.full([TILE], NAN_KEY, tl.int32), tl.full([TILE], -(2**31), tl.int32)
        for tile in range(0, number, TILE):
            x = _x(logits, candidates, few, tile + tl.arange(0, TILE), number, by)
            keys = key(x)
            if MASS:
                f = weight(x, peak, bits)
            else:
                f = tl.full([TILE], 1, tl.int64)
            above_a += tl.sum(tl.where(keys >= a, f, 0), 0)
            above_b += tl.sum(tl.where(keys >= b, f, 0), 0)
            above_c += tl.sum(tl.where(keys >= c, f, 0), 0)
            inside = (keys >= low) & (keys < high)
            least = tl.minimum(least, tl.where(inside, keys, least))
            most = tl.maximum(most, tl.where(inside, keys, most))
        if above_c >= target:
            low, mass = c, above_c
        elif above_b >= target:
            low, high, mass = b, c, above_b
        elif above_a >= target:
            low, high, mass = a, b, above_a
        else:
            high = a
        low, high = tl.maximum(low, tl.min(least, 0)), tl.minimum(high, tl.max(most, 0) + 1)
    return low, mass


@triton.jit
def _kept_weights(x, peak, bits, cut, dropped, seen, least):
    """(weights, 0 where removed; how many are tied with the cut): of ties of the cut, the first `dropped` are removed.

    seen: ties before this tile. least: the smallest weight that min-p keeps.
    """
    keys, weights = key(x), weight(x, peak, bits)
    tied = (keys == cut).to(tl.int32)
    keep = (keys >= cut) & (weights >= least)
    if dropped > 0:
        keep = keep & ((keys > cut) | (seen + tl.cumsum(tied, 0) > dropped))
    return tl.where(keep, weights, 0), tl.sum(tied, 0)


@triton.jit
def _kept_mass(logits, candidates, few, number, by, peak, bits, cut, dropped, least, TILE: tl.constexpr):
    total = tl.full([], 0, tl.int64)
    seen = 0
    for tile in range(0, number, TILE):
        x = _x(logits, candidates, few, tile + tl.arange(0, TILE), number, by)
        weights, ties = _kept_weights(x, peak, bits, cut, dropped, seen, least)
        total += tl.sum(weights, 0)
        seen += ties
    return total


@triton.jit
def _locate(logits, candidates, few, number, by, peak, bits, cut, dropped, least, target, before, tile, TILE: tl.constexpr):
    """The first place where the cumulative weight is above `target`, looking from `tile` on, with `before` before it."""
    seen, found = 0, -1
    while (tile < number) & (found < 0):
        at = tile + tl.arange(0, TILE)
        x = _x(logits, candidates, few, at, number, by)
        weights, ties = _kept_weights(x, peak, bits, cut, dropped, seen, least)
        mass = tl.sum(weights, 0)
        if before + mass > target:
            found = tl.min(tl.where(before + tl.cumsum(weights, 0) > target, at, number), 0)
        before += mass
        seen += ties
        tile += TILE
    return found


@triton.jit
def _begin(sums, row, num_splits, chunk, target, LEVELS: tl.constexpr, SPLITS: tl.constexpr):
    """(mass before the chunk in which a draw from the whole row lies, where that chunk starts)."""
    split = tl.arange(0, SPLITS)
    own = tl.load(sums + (row * num_splits + split + 1) * (2 * LEVELS) - 1, mask=split < num_splits, other=0)
    after = tl.cumsum(own, 0)
    first = tl.min(tl.where(after > target, split, SPLITS), 0)
    return tl.sum(tl.where(split < first, own, 0), 0), first * chunk


@triton.jit(
    do_not_specialize=["num_splits"],
    do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p", "uniforms", "seeds", "positions"],
)
def sample_kernel(
    logits, row_stride, partial, num_splits, temperature, top_k, top_p, min_p, uniforms, seeds, positions,
    sums, candidates, tokens, peaks, chunk,
    vocab_size: tl.constexpr, bits: tl.constexpr, LEVELS: tl.constexpr, SPLITS: tl.constexpr, CANDIDATES: tl.constexpr,
    COUNTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Candidates are few if there are at most CANDIDATES of them: then `candidates` has them: int32 [R, 2, CANDIDATES], the logits' bits and the ids."""
    row = tl.program_id(0).to(tl.int64)
    highest, first = best_of(partial, row, num_splits, SPLITS)
    peak = value(highest)
    tl.store(peaks + row, peak)
    tl.store(tokens + row, first)
    if (tl.load(temperature + row) > 0.0) & (tl.abs(peak) < float("inf")):
        logits, candidates = logits + row * row_stride, candidates + row * (2 * CANDIDATES)
        by, k, p, share = divisor(temperature, row), tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        level, lowest, number, mass, total = chosen_level(
            sums, row, num_splits, k, p, share, peak, vocab_size, bits, LEVELS, SPLITS
        )
        few, limited, reached = number <= CANDIDATES, (k > 0) & (k < vocab_size), number
        number = tl.where(few, number, vocab_size).to(tl.int32)
        low = lowest
        above = tl.max(tl.where(tl.arange(0, LEVELS) == level - 1, level_keys(peak, LEVELS), NEG_INF_KEY), 0)
        high = tl.where(level > 0, above, highest + 1)  # the level before does not reach as far
        if limited:
            low, _ = _search(logits, candidates, few, number, by, peak, bits, low, high, reached, k, False, TILE)
            total = _kept_mass(logits, candidates, few, number, by, peak, bits, low, 0, 0, TILE)
            mass, high = total, key(peak) + 1
        dropped = tl.full([], 0, tl.int64)
        if p < 1.0:
            wanted = wanted_mass(total, p)
            low, mass = _search(logits, candidates, few, number, by, peak, bits, low, high, mass, wanted, True, TILE)
            tie = weight(value(low), peak, bits)
            dropped = (mass - wanted) // tie
            total = mass - dropped * tie
        cut, least = low, least_weight(share, bits)
        if share > 0.0:
            total = _kept_mass(logits, candidates, few, number, by, peak, bits, cut, dropped, least, TILE)
        if COUNTER:
            uniform = counter_uniform(tl.load(seeds + row), tl.load(positions + row))
        else:
            uniform = tl.load(uniforms + row)
        target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
        before, tile = tl.full([], 0, tl.int64), 0
        if ((k <= 0) | (k >= vocab_size)) & (p >= 1.0) & (share <= 0.0) & (number == vocab_size):
            before, tile = _begin(sums, row, num_splits, chunk, target, LEVELS, SPLITS)
        place = _locate(logits, candidates, few, number, by, peak, bits, cut, dropped, least, target, before, tile, TILE)
        if few:
            place = tl.load(candidates + CANDIDATES + place)
        tl.store(tokens + row, place.to(tl.int64))
