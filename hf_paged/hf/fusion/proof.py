"""When a fused form may stand in for a module: it ran beside the module's own forward on random input, and agreed.

What agreement is depends on what the fused form promises:

- In fp32: the largest difference stays below a tolerance, relative to the row's largest value.
- In bf16 and fp16 on kernels that round wherever the modules round (CPU, reference): the same bits.
- In bf16 and fp16 on Triton, whose kernels keep in fp32 what a chain of modules rounds at every step: the result must
  be about as near to the truth as the module's own. The truth is a copy of the module in fp32 on the same input. The
  error of a row is the root mean square of its difference as a share of the row's own, and the rows' errors are taken
  together in the same way. A kernel that leaves out a rounding is nearer to the truth than the module, one that rounds
  in other places is as near; a wrong formula (another epsilon, an offset, a swapped half) is farther by orders of
  magnitude on some of the rows, whose sizes differ by a factor of a million. MARGIN is for the scatter of roundings:
  rows of 24 values were seen to come to 1.2 times the own error, and longer ones come nearer to 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

MARGIN = 1.5
MAGNITUDES = (1e-4, 1e-2, 1.0, 1.0, 10.0, 100.0)


def random_rows(size: int, like: Tensor) -> Tensor:
    """Random rows of very different magnitude, so that a wrong epsilon or offset shows. Leaves torch's RNG alone."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(len(MAGNITUDES), size, generator=generator) * torch.tensor(MAGNITUDES)[:, None]
    return rows.to(like)


def agree(
    actual: Tensor,
    expected: Tensor,
    *,
    tolerance: float = 2e-6,
    backend: str = "cpu",
    exact: Callable[[], Tensor] | None = None,
) -> bool:
    """Whether `actual` may stand for the module's own `expected` [..., N]; see the module's docstring.

    Args:
        tolerance: of fp32 results.
        backend: whose kernels gave `actual`.
        exact: gives the module's result in fp32; asked for narrow types on Triton only.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if expected.dtype == torch.float32:
        scale = expected.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
        return bool(((actual - expected).abs() / scale).max() <= tolerance)
    if backend != "triton" or exact is None or torch.equal(actual, expected):
        return torch.equal(actual, expected)
    truth = exact()
    one_rounding = torch.finfo(expected.dtype).eps / 8  # about the error of a row that is rounded once
    return error(actual, truth) <= MARGIN * max(error(expected, truth), one_rounding)


def error(rows: Tensor, truth: Tensor) -> float:
    """How far `rows` [..., N] are from the truth: root mean square of every row's share."""
    size = truth.pow(2).mean(-1).clamp_min(1e-30)
    shares = (rows.float() - truth).pow(2).mean(-1) / size
    return shares.mean().sqrt().nan_to_num(nan=float("inf")).item()


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` with its classes' own forwards. It shares configurations, which hooks may be keyed by."""
    shared = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    return copy.deepcopy(module, shared)


def in_fp32(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """What `module(x)` would be without rounding, when asked."""
    return lambda: plain_copy(module).float()(x.float())
