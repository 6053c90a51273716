"""Drawing tokens: a counter-based uniform per row, and an inverse CDF in exact integers.

Floating-point sums depend on their order, and the order on the shape of the batch. So probabilities become integers
first: the weight of a token is floor(exp(logit - max) * 2^s). Integer sums are exact, hence a row's token depends on
its own logits and its own uniform alone: not on its batch mates, nor on which candidates were looked at, as long as
the kept tokens are the same. s = 62 - bit_length(V) lets V weights fit in int64; the error per probability is fp32's.
"""

from __future__ import annotations

import torch

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: 2^64 / golden ratio
_CHILD = 0xD1B54A32D192ED03  # keeps derived seeds apart from the stream of draws


def _mix(value: int) -> int:
    """splitmix64's finaliser: a bijection of 64-bit integers that spreads every bit over all."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_seed(seed: int, index: int) -> int:
    """A 64-bit seed for child `index` of `seed`; distinct children of one seed get distinct seeds."""
    return _mix(_mix(seed + _CHILD) + index * _GOLDEN)


def uniform(seed: int, position: int) -> float:
    """The draw in [0, 1) of a row at output token `position`: 53 bits of mix(mix(seed) + (position + 1) * golden)."""
    return (_mix(_mix(seed) + (position + 1) * _GOLDEN) >> 11) * 2.0**-53


def rows_at_once(x_RC: torch.Tensor) -> int:
    """Rows to treat in one go: on CPU few enough for the temporaries to stay in the cache; 256 elsewhere."""
    return max(1, 2**18 // x_RC.shape[1]) if x_RC.device.type == "cpu" else 256


def draw(logits_RC: torch.Tensor, uniforms_R: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Column of each row by inverse CDF over softmax(logits), columns in the given order.

    Args:
        logits_RC: fp32, -inf where a token is removed; each row's maximum must be finite.
        uniforms_R: float64 in [0, 1).
        vocab_size: sets the fixed-point scale, so that it is the same for every choice of columns.

    Returns: int64 [R].
    """
    scale = 2.0 ** (62 - vocab_size.bit_length())
    rows = rows_at_once(logits_RC)
    chunks = zip(logits_RC.split(rows), uniforms_R.split(rows), strict=True)
    return torch.cat([_draw_chunk(logits, uniforms, scale) for logits, uniforms in chunks])


def _draw_chunk(logits_RC: torch.Tensor, uniforms_R: torch.Tensor, scale: float) -> torch.Tensor:
    weights = (logits_RC - logits_RC.amax(-1, keepdim=True)).exp_().mul_(scale).to(torch.int64)
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = (uniforms_R[:, None] * total).to(torch.int64)
    target = torch.minimum(target, total - 1)  # the product may round up to the total
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
