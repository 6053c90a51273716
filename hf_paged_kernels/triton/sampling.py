"""Argmax and sampling without a sort. Thresholds are searched for in integers that are ordered as the logits are.

A row's tokens are kept from some logit upwards: the k-th largest (top-k), then the smallest whose mass, together with all
that is above it, reaches a target (top-p). Both are "the largest key t with F(t) >= target", F(t) = sum of f over tokens
with keys >= t, and f = 1 or the token's integer weight. Four-way search over keys: each pass over the row evaluates F at
three pivots, and shrinks the bracket to the keys that occur in it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sampling import ALLOWED, COUNT_SHIFT, ENDING, FORBIDDEN, IN_PROMPT, OCCURRENCE, Penalties, weight_bits
from .launch import launch, num_sms

_MAX_SPLITS = 32  # programs per row for the maximum
_SCAN = 2048  # elements a program looks at together: 8 for each of 256 threads
_SEARCH = 4096  # the same for 512 threads, one program per row
_RULES = 2048  # logits per program of `penalize`

_NEG_INF_KEY = tl.constexpr(-2139095041)  # of -inf
_NAN_KEY = tl.constexpr(0x7FFFFFFF)
_IN_PROMPT = tl.constexpr(IN_PROMPT)
_ALLOWED = tl.constexpr(ALLOWED)
_FORBIDDEN = tl.constexpr(FORBIDDEN)
_ENDING = tl.constexpr(ENDING)
_COUNT_SHIFT = tl.constexpr(COUNT_SHIFT)
_OCCURRENCE = tl.constexpr(OCCURRENCE)
# Every product and sum is rounded as written, so that results are the same on every device; tl.fma says where not.
_EXACT = dict(enable_fp_fusion=False)


@triton.jit
def _key(x):
    """int32, ordered as fp32 values are; 0.0 and -0.0 are one, NaN is the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, _NAN_KEY, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def _value(key):
    key = key.to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, peak, bits):
    """floor(exp(x - peak) * 2^bits) as int64, for x <= peak. exp is within 0.75 units of its last place.

    d = n ln 2 + r + rest with |r| <= ln 2 / 2: ln 2 is split in two so that n times the first part, of 16 bits, is exact.
    exp(r) is its Taylor polynomial to r^7, whose remainder is a tenth of the last place; what 1 + r loses is added back.
    """
    d = tl.maximum(x - peak, -64.0)  # less weighs nothing: bits is at most 61
    n = tl.floor(tl.fma(d, 1.4426950408889634, 0.5))
    r, rest = tl.fma(n, -0.693145751953125, d), n * -1.428606765330187e-06
    whole = r + rest
    p = tl.fma(whole, 1 / 5040, 1 / 720)
    p = tl.fma(p, whole, 1 / 120)
    p = tl.fma(p, whole, 1 / 24)
    p = tl.fma(p, whole, 1 / 6)
    p = tl.fma(p, whole, 0.5)
    one_r = 1.0 + r
    exp_r = one_r + ((r - (one_r - 1.0)) + tl.fma(whole * whole, p, rest))
    power = ((n.to(tl.int32) + bits + 127) << 23).to(tl.float32, bitcast=True)
    return (exp_r * power).to(tl.int64)


@triton.jit
def _scaled(logits, at, vocab_size, temperature):
    x = tl.load(logits + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, temperature)


@triton.jit
def _divisor(temperature, row):
    """The row's temperature in fp32; greedy rows are divided by 1, which changes nothing."""
    value = tl.load(temperature + row).to(tl.float32)
    return tl.where(value == 0.0, 1.0, value)


@triton.jit
def _unpacked(best):
    """(key, index) of a packed maximum, see `_scan_kernel`."""
    return (best >> 32).to(tl.int32), 0xFFFFFFFF - (best & 0xFFFFFFFF)


@triton.jit
def _scan_kernel(
    logits, row_stride, temperature, partial, tokens, peaks, vocab_size, chunk,
    SCALED: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The maximum of one chunk of a row, with its first index: both in an int64, key above and ~index below."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    divisor = 1.0
    if SCALED:
        divisor = _divisor(temperature, row)
    start = split * chunk
    end = tl.minimum(start + chunk, vocab_size)
    best = tl.full([TILE], -(2**63), tl.int64)
    for tile in range(start, end, TILE):
        at = tile + tl.arange(0, TILE)
        key = _key(_scaled(logits + row * row_stride, at, end, divisor)).to(tl.int64)
        best = tl.maximum(best, tl.where(at < end, (key << 32) | (0xFFFFFFFF - at.to(tl.int64)), best))
    found = tl.max(best, 0)
    if WHOLE:
        key, index = _unpacked(found)
        tl.store(tokens + row, index)
        tl.store(peaks + row, _value(key))
    else:
        tl.store(partial + row * tl.num_programs(1) + split, found)


@triton.jit
def _best_of(partial, row, num_splits, SPLITS: tl.constexpr):
    at = tl.arange(0, SPLITS)
    found = tl.load(partial + row * num_splits + at, mask=at < num_splits, other=-(2**63))
    return _unpacked(tl.max(found, 0))


@triton.jit
def _pick_kernel(partial, tokens, peaks, num_splits, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    key, index = _best_of(partial, row, num_splits, SPLITS)
    tl.store(tokens + row, index)
    tl.store(peaks + row, _value(key))


@triton.jit
def _search(
    logits, vocab_size, divisor, peak, bits, low, high, mass, target,
    MASS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(largest key t in [low, high) with F(t) >= target, F(t)), given that F(low) = mass >= target > F(high).

    Pivots are equally spaced among values and among keys by turns: the former is quick on logits as they come, the latter
    bounds the number of passes (16 of each would do for all 2^32 keys).
    """
    turn = 0
    while high - low > 1:
        step = (high - low) // 4
        a, b, c = low + step, low + 2 * step, low + 3 * step
        if turn % 2 == 0:
            top = _value(high - 1)
            part = (top - tl.maximum(_value(low), top - 64.0)) * 0.25
            a, b, c = _key(top - 3 * part).to(tl.int64), _key(top - 2 * part).to(tl.int64), _key(top - part).to(tl.int64)
        turn += 1
        a = tl.minimum(tl.maximum(a, low + 1), high - 1).to(tl.int32)
        b = tl.minimum(tl.maximum(b, low + 1), high - 1).to(tl.int32)
        c = tl.minimum(tl.maximum(c, low + 1), high - 1).to(tl.int32)
        from_a, from_b = tl.zeros([TILE], tl.int64), tl.zeros([TILE], tl.int64)
        from_c = tl.zeros([TILE], tl.int64)
        least, most = tl.full([TILE], _NAN_KEY, tl.int32), tl.full([TILE], -(2**31), tl.int32)
        for tile in range(0, vocab_size, TILE):
            x = _scaled(logits, tile + tl.arange(0, TILE), vocab_size, divisor)
            key = _key(x)
            if MASS:
                f = _weight(x, peak, bits)
            else:
                f = tl.full([TILE], 1, tl.int64)
            from_a += tl.where(key >= a, f, 0)
            from_b += tl.where(key >= b, f, 0)
            from_c += tl.where(key >= c, f, 0)
            inside = (key >= low.to(tl.int32)) & (key < high.to(tl.int32))
            least = tl.minimum(least, tl.where(inside, key, least))
            most = tl.maximum(most, tl.where(inside, key, most))
        above_a, above_b, above_c = tl.sum(from_a, 0), tl.sum(from_b, 0), tl.sum(from_c, 0)
        first, last = tl.min(least, 0).to(tl.int64), tl.max(most, 0).to(tl.int64)
        if above_c >= target:
            low, mass = c.to(tl.int64), above_c
        elif above_b >= target:
            low, high, mass = b.to(tl.int64), c.to(tl.int64), above_b
        elif above_a >= target:
            low, high, mass = a.to(tl.int64), b.to(tl.int64), above_a
        else:
            high = a.to(tl.int64)
        low, high = tl.maximum(low, first), tl.minimum(high, last + 1)
    return low, mass


@triton.jit
def _kept_weights(x, peak, bits, cut, dropped, seen, least):
    """(weights, 0 where removed; how many are tied with the cut): of ties of the cut, the first `dropped` are removed.

    seen: ties before this tile. least: the smallest weight that min-p keeps.
    """
    key, weight = _key(x), _weight(x, peak, bits)
    tied = (key == cut).to(tl.int32)
    keep = (key >= cut) & (weight >= least)
    if dropped > 0:
        keep = keep & ((key > cut) | (seen + tl.cumsum(tied, 0) > dropped))
    return tl.where(keep, weight, 0), tl.sum(tied, 0)


@triton.jit
def _kept_mass(logits, vocab_size, divisor, peak, bits, cut, dropped, least, TILE: tl.constexpr):
    total = tl.full([], 0, tl.int64)
    seen = 0
    for tile in range(0, vocab_size, TILE):
        x = _scaled(logits, tile + tl.arange(0, TILE), vocab_size, divisor)
        weight, ties = _kept_weights(x, peak, bits, cut, dropped, seen, least)
        total += tl.sum(weight, 0)
        seen += ties
    return total


@triton.jit
def _locate(logits, vocab_size, divisor, peak, bits, cut, dropped, least, target, TILE: tl.constexpr):
    """The first token whose cumulative weight is above `target`."""
    before = tl.full([], 0, tl.int64)
    seen, tile, found = 0, 0, -1
    while (tile < vocab_size) & (found < 0):
        at = tile + tl.arange(0, TILE)
        x = _scaled(logits, at, vocab_size, divisor)
        weight, ties = _kept_weights(x, peak, bits, cut, dropped, seen, least)
        mass = tl.sum(weight, 0)
        if before + mass > target:
            found = tl.min(tl.where(before + tl.cumsum(weight, 0) > target, at, vocab_size), 0)
        before += mass
        seen += ties
        tile += TILE
    return found


@triton.jit
def _mix(value):
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def _counter_uniform(seed, position):
    """See `sampling.sample`; arithmetic modulo 2^64."""
    counter = (position + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    bits = _mix(_mix(seed.to(tl.uint64, bitcast=True)) + counter)
    return (bits >> 11).to(tl.int64).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _sample_kernel(
    logits, row_stride, partial, num_splits, temperature, top_k, top_p, min_p, uniforms, seeds, positions,
    tokens, peaks, vocab_size, bits,
    COUNTER: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    peak_key, first = _best_of(partial, row, num_splits, SPLITS)
    peak = _value(peak_key)
    tl.store(peaks + row, peak)
    token = first
    if (tl.load(temperature + row) > 0.0) & (tl.abs(peak) < float("inf")):
        logits += row * row_stride
        divisor = _divisor(temperature, row)
        k, p, share = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        low, high = tl.full([], _NEG_INF_KEY, tl.int64), peak_key.to(tl.int64) + 1
        if (k > 0) & (k < vocab_size):
            count = tl.full([], vocab_size, tl.int64)
            low, _ = _search(logits, vocab_size, divisor, peak, bits, low, high, count, k, False, TILE)
        total = _kept_mass(logits, vocab_size, divisor, peak, bits, low.to(tl.int32), 0, 0, TILE)
        dropped = tl.full([], 0, tl.int64)
        if p < 1.0:
            limit = ((1.0 - p) * total.to(tl.float64)).to(tl.int64)
            wanted = tl.maximum(total - limit, 1)
            low, mass = _search(logits, vocab_size, divisor, peak, bits, low, high, total, wanted, True, TILE)
            tie = _weight(_value(low), peak, bits)
            dropped = (mass - wanted) // tie
            total = mass - dropped * tie
        cut = low.to(tl.int32)
        least = tl.ceil(share * (tl.full([], 1, tl.int64) << bits).to(tl.float64)).to(tl.int64)
        if share > 0.0:
            total = _kept_mass(logits, vocab_size, divisor, peak, bits, cut, dropped, least, TILE)
        if COUNTER:
            uniform = _counter_uniform(tl.load(seeds + row), tl.load(positions + row))
        else:
            uniform = tl.load(uniforms + row)
        target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
        token = _locate(logits, vocab_size, divisor, peak, bits, cut, dropped, least, target, TILE).to(tl.int64)
    tl.store(tokens + row, token)


@triton.jit
def _penalize_kernel(
    logits, row_stride, scores, states, bias, drafts, num_drafts, slots, bias_slots, repetition, presence, frequency,
    only_allowed, may_not_end, vocab_size,
    BIAS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < vocab_size
    x = tl.load(logits + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        slot = tl.load(bias_slots + row)
        if slot >= 0:
            x += tl.load(bias + slot * vocab_size + at, mask=inside, other=0.0)
    slot = tl.load(slots + row)
    if slot >= 0:
        seen = tl.load(states + slot * vocab_size + at, mask=inside, other=0)
        for index in range(num_drafts):
            seen += tl.where(at == tl.load(drafts + row * num_drafts + index), _OCCURRENCE, 0)
        count = seen >> _COUNT_SHIFT
        factor = tl.load(repetition + row).to(tl.float32)
        repeated = tl.where(x < 0, x * factor, tl.div_rn(x, factor))
        x = tl.where(((seen & _IN_PROMPT) != 0) | (count > 0), repeated, x)
        by_count = tl.load(frequency + row).to(tl.float32) * count.to(tl.float32)
        x = tl.where(count > 0, x - by_count - tl.load(presence + row).to(tl.float32), x)
        closed = (seen & _FORBIDDEN) != 0
        closed = closed | ((tl.load(only_allowed + row) != 0) & ((seen & _ALLOWED) == 0))
        closed = closed | ((tl.load(may_not_end + row) != 0) & ((seen & _ENDING) != 0))
        x = tl.where(closed, float("-inf"), x)
    tl.store(scores + row * vocab_size + at, x, mask=inside)


@triton.jit
def _resolved(tokens, sampled, at, SAMPLED: tl.constexpr):
    token = tl.load(tokens + at)
    if SAMPLED:
        if token < 0:
            token = tl.load(sampled - 1 - token)
    return token


@triton.jit
def _record_kernel(states, slots, tokens, marks, sampled, vocab_size, SAMPLED: tl.constexpr):
    at = tl.program_id(0)
    token = _resolved(tokens, sampled, at, SAMPLED)
    mark = tl.load(marks + at).to(tl.int32)
    place = states + tl.load(slots + at) * vocab_size + token
    inside = (token >= 0) & (token < vocab_size)
    if mark == _OCCURRENCE:
        tl.atomic_add(place, mark, mask=inside)
    else:
        tl.atomic_or(place, mark, mask=inside)


@triton.jit
def _forbid_kernel(scores, rows, tokens, previous, triggers, sampled, vocab_size, SAMPLED: tl.constexpr):
    at = tl.program_id(0)
    trigger = tl.load(triggers + at)
    if (trigger < 0) | (_resolved(previous, sampled, at, SAMPLED) == trigger):
        tl.store(scores + tl.load(rows + at) * vocab_size + tl.load(tokens + at), float("-inf"))


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See `sampling.argmax`. Few rows are split over several programs each, and a second kernel picks the best."""
    tokens, peaks = _outputs(logits)
    num_splits = _num_splits(logits)
    partial = _scan(logits, None, num_splits, tokens, peaks)
    if num_splits > 1:
        splits = triton.next_power_of_2(num_splits)
        launch(_pick_kernel, (len(logits),), partial, tokens, peaks, num_splits, SPLITS=splits, num_warps=1)
    return tokens, peaks


def sample(logits, temperature, top_k, top_p, min_p, uniforms, seeds, positions) -> tuple[Tensor, Tensor]:
    """See `sampling.sample`. One program per row, after the scan for the maxima."""
    tokens, peaks = _outputs(logits)
    num_splits = _num_splits(logits)
    partial = _scan(logits, temperature, num_splits, tokens, peaks, whole=False)
    vocab_size, counter = logits.shape[1], uniforms is None
    launch(_sample_kernel, (len(logits),), logits, logits.stride(0), partial, num_splits,
           temperature, top_k, top_p, min_p, seeds if counter else uniforms, seeds if counter else top_k,
           positions if counter else top_k, tokens, peaks, vocab_size, weight_bits(vocab_size),
           COUNTER=counter, SPLITS=triton.next_power_of_2(num_splits), TILE=_tile(vocab_size, _SEARCH),
           num_warps=16, **_EXACT)  # fmt: skip
    return tokens, peaks


def penalize(logits: Tensor, states: Tensor, rules: Penalties, bias: Tensor | None, drafts: Tensor | None) -> Tensor:
    """See `sampling.penalize`."""
    count, vocab_size = logits.shape
    scores = torch.empty(count, vocab_size, dtype=torch.float32, device=logits.device)
    num_drafts = 0 if drafts is None else drafts.shape[1]
    tile = _tile(vocab_size, _RULES)
    launch(_penalize_kernel, (count, triton.cdiv(vocab_size, tile)), logits, logits.stride(0), scores, states,
           scores if bias is None else bias, rules.slots if drafts is None else drafts.contiguous(), num_drafts,
           *rules, vocab_size, BIAS=bias is not None, TILE=tile, num_warps=8, **_EXACT)  # fmt: skip
    return scores


def record(states: Tensor, slots: Tensor, tokens: Tensor, marks: Tensor, sampled: Tensor | None) -> None:
    """See `sampling.record`. Integer atomics: the order of the programs does not matter."""
    launch(_record_kernel, (len(slots),), states, slots, tokens, marks, tokens if sampled is None else sampled,
           states.shape[1], SAMPLED=sampled is not None, num_warps=1)  # fmt: skip


def forbid(scores: Tensor, rows: Tensor, tokens: Tensor, previous: Tensor, triggers: Tensor, sampled: Tensor | None) -> None:
    """See `sampling.forbid`."""
    launch(_forbid_kernel, (len(rows),), scores, rows, tokens, previous, triggers,
           tokens if sampled is None else sampled, scores.shape[1], SAMPLED=sampled is not None, num_warps=1)  # fmt: skip


def _outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    count, device = len(logits), logits.device
    return torch.empty(count, dtype=torch.int64, device=device), torch.empty(count, dtype=torch.float32, device=device)


def _num_splits(logits: Tensor) -> int:
    """Programs per row of the scan: enough in all to have four for every multiprocessor."""
    wanted = triton.cdiv(4 * num_sms(logits.device), len(logits))
    return min(wanted, _MAX_SPLITS, triton.cdiv(logits.shape[1], _SCAN))


def _scan(logits, temperature, num_splits: int, tokens, peaks, whole: bool = True) -> Tensor:
    """Packed maxima int64 [R, splits]; with one split per row and `whole`, tokens and peaks instead."""
    count, vocab_size = logits.shape
    partial = torch.empty(count, num_splits, dtype=torch.int64, device=logits.device)
    tile = _tile(vocab_size, _SCAN)
    chunk = triton.cdiv(triton.cdiv(vocab_size, num_splits), tile) * tile
    launch(_scan_kernel, (count, num_splits), logits, logits.stride(0), peaks if temperature is None else temperature,
           partial, tokens, peaks, vocab_size, chunk, SCALED=temperature is not None,
           WHOLE=whole and num_splits == 1, TILE=tile, num_warps=8, **_EXACT)  # fmt: skip
    return partial


def _tile(vocab_size: int, most: int) -> int:
    return min(most, triton.next_power_of_2(vocab_size))
