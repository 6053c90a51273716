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

Quantized weights are part of the module, and of the truth: nothing above changes. But where a layer rounds its inputs to
8 bits, inputs that differ in their last bit may fall on two sides of a tie, and results then differ by a step of that
rounding, far more than a right formula is allowed above and about as much as some wrong ones. So two questions are put:

- Is it the same formula? Both run with all layers multiplying inputs that are not rounded, and agree as above.
- Do the kernels that round compute it? Both run as they are. If the results do not agree as above, the fused form's must
  be as near to the truth (in fp32, no input rounded) as the module's, within MARGIN: a flipped tie leaves an input half a
  step from its true value, as any other rounding does, so the errors are the same in size.

What the second question alone would let pass (two kinds of GELU differ by less than a step) the first one does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from .rounding import on_kernels, rounds_inputs, unrounded
from .sharded import shard_copies

MARGIN = 1.5
_vote: ContextVar[Callable[[bool], bool] | None] = ContextVar("hf_paged_vote", default=None)
MAGNITUDES = (1e-4, 1e-2, 1.0, 1.0, 10.0, 100.0)


@contextmanager
def voting(vote: Callable[[bool], bool] | None):
    """While inside, what is proven on parts of a sharded model is proven if `vote` makes it so: all ranks must agree."""
    token = _vote.set(vote)
    try:
        yield
    finally:
        _vote.reset(token)


def proven(here: bool) -> bool:
    """Whether something is proven, being so or not on this rank."""
    vote = _vote.get()
    return here if vote is None else vote(here)


def random_rows(size: int, like: Tensor) -> Tensor:
    """Random rows of very different magnitude, so that a wrong epsilon or offset shows. Leaves torch's RNG alone."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(len(MAGNITUDES), size, generator=generator) * torch.tensor(MAGNITUDES)[:, None]
    return rows.to(like)


def stands_for(
    run: Callable[[], Tensor], module: nn.Module, x: Tensor, *, tolerance: float = 2e-6, backend: str = "cpu"
) -> bool:
    """Whether what `run` gives may stand for module(x) [..., N]; see the module's docstring. Arguments as of `agree`."""
    return proven(_stands_for(run, module, x, tolerance, backend))


def _stands_for(run: Callable[[], Tensor], module: nn.Module, x: Tensor, tolerance: float, backend: str) -> bool:
    options = dict(tolerance=tolerance, backend=backend)
    exact, rounds = in_fp32(module, x), rounds_inputs(module)
    with unrounded(module):
        if not agree(run(), module(x), truth=exact, **options):
            return False
        truth = exact() if rounds else None
    if not rounds:
        return True
    with on_kernels(module, backend):
        return agree_rounded(run(), module(x), truth=truth, **options)


def agree(
    actual: Tensor,
    expected: Tensor,
    *,
    tolerance: float = 2e-6,
    backend: str = "cpu",
    truth: Tensor | Callable[[], Tensor] | None = None,
) -> bool:
    """Whether `actual` may stand for the module's own `expected` [..., N], where no layer rounds its inputs to 8 bits.

    Args:
        tolerance: of fp32 results.
        backend: whose kernels gave `actual`.
        truth: the module's result in fp32, or what gives it; used for narrow types on Triton only.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if expected.dtype == torch.float32:
        scale = expected.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
        return bool(((actual - expected).abs() / scale).max() <= tolerance)
    if backend != "triton" or truth is None or torch.equal(actual, expected):
        return torch.equal(actual, expected)
    return _as_near(actual, expected, truth if isinstance(truth, Tensor) else truth())


def agree_rounded(actual: Tensor, expected: Tensor, *, tolerance: float, backend: str, truth: Tensor) -> bool:
    """The same where layers round their inputs. `truth`: in fp32, with no input rounded."""
    same = agree(actual, expected, tolerance=tolerance, backend=backend)
    bits = expected.dtype != torch.float32 and backend != "triton"  # there inputs, and so their roundings, are the same
    return same or not bits and actual.shape == expected.shape and _as_near(actual, expected, truth)


def _as_near(actual: Tensor, expected: Tensor, truth: Tensor) -> bool:
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
    copied = copy.deepcopy(module, shared)
    shard_copies(module, copied)
    return copied


def in_fp32(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """What `module(x)` would be without rounding, when asked."""
    return lambda: plain_copy(module).float()(x.float())
