"""GPTQ: rounding one column after another, each time changing the columns to come so that they make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers
(ICLR 2023), algorithm 1. With H the second moments of the inputs and U the upper Cholesky factor of its inverse, column
k, rounded with the error e = (w_k - round(w_k)) / U_kk, changes each later column j by -e U_kj.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_paged_kernels.quantized import QuantizedWeight

from ..base.errors import InvalidArgument
from .moments import Moments
from .rounding import Grid, Scheme, assemble, fit_best

BLOCK = 128  # columns that are rounded before the rest of the matrix hears of it, in one product
MOST_DAMPING = 1.0


@dataclass(frozen=True)
class Gptq:
    """Options of the algorithm.

    Attributes:
        act_order: round the columns of the largest inputs first, while many others can still make up for their error.
        static_groups: with `act_order`: groups stay neighbouring columns, with grids chosen beforehand. Otherwise groups
            are columns that are rounded one after another: a little more exact, but inputs must be gathered at run time,
            and experts, each with an order of its own, cannot be stacked.
        damping: added to the diagonal of H, as a share of its mean. Where H is too close to singular for it, it grows
            tenfold until the factorization works.

    Raises:
        InvalidArgument: damping is not between 0 and 1.
    """

    act_order: bool = True
    static_groups: bool = True
    damping: float = 0.01

    def __post_init__(self):
        if not 0 < self.damping <= MOST_DAMPING:
            raise InvalidArgument(f"damping must be above 0 and at most {MOST_DAMPING:g}, got {self.damping!r}")


def gptq(weight: Tensor, moments: Moments, scheme: Scheme, options: Gptq = Gptq()) -> QuantizedWeight:
    """weight [N, K] rounded for inputs with these moments.

    Raises InvalidArgument if the inputs are not finite, or the scheme's groups do not divide K.
    """
    K = weight.shape[-1]
    columns = scheme.columns(K)
    second = moments.second
    importance = second.diagonal()
    order = importance.argsort(descending=True, stable=True) if options.act_order else torch.arange(K, device=weight.device)
    static = options.act_order and options.static_groups
    groups = order // columns if static else torch.arange(K, device=weight.device) // columns
    work = weight.float()[:, order].T.contiguous()  # [K, N]: a column of the weight lies together
    factor = _inverse_factor(second[order][:, order], options.damping)
    grids = _static_grids(weight.float(), scheme, importance) if static else None
    q, scales, zeros = _round_columns(work, factor, groups, grids, importance[order], scheme)
    return _in_order(q, scales, zeros, order, columns, scheme, gathered=options.act_order and not static)


def _round_columns(
    work: Tensor, factor: Tensor, groups: Tensor, grids: Grid | None, importance: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds the rows of `work` [K, N], which it changes. Returns q [K, N], scales and zeros [groups, N].

    `grids`: [N, groups] chosen beforehand; None: that of a group of rows is chosen when its first row's turn comes.
    """
    K, N = work.shape
    columns = scheme.columns(K)
    q = torch.empty_like(work)
    if grids is None:
        scales, zeros = work.new_empty(K // columns, N), work.new_empty(K // columns, N)
    else:
        scales, zeros = grids.scales[..., 0].T.contiguous(), grids.zeros[..., 0].T.contiguous()
    numbers, pivots = groups.tolist(), factor.diagonal().tolist()
    for start in range(0, K, BLOCK):
        end = min(start + BLOCK, K)
        errors = work.new_empty(end - start, N)
        for k in range(start, end):
            group = numbers[k]
            if grids is None and k % columns == 0:
                members = slice(k, k + columns)
                grid = fit_best(work[members].T, scheme, importance[members])
                scales[group], zeros[group] = grid.scales[:, 0], grid.zeros[:, 0]
            q[k] = Grid(scales[group], zeros[group], scheme.largest).nearest(work[k])
            error = (work[k] - (q[k] - zeros[group]) * scales[group]) / pivots[k]
            errors[k - start] = error
            if k + 1 < end:
                work[k + 1 : end].addr_(factor[k, k + 1 : end], error, alpha=-1)
        work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return q, scales, zeros


def _static_grids(weight: Tensor, scheme: Scheme, importance: Tensor) -> Grid:
    groups = weight.unflatten(-1, (-1, scheme.columns(weight.shape[-1])))
    return fit_best(groups, scheme, importance.unflatten(-1, (groups.shape[-2], -1)))


def _inverse_factor(second: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor [K, K] of the inverse of `second`, which may be singular, with damping."""
    diagonal = second.diagonal()
    mean = diagonal.mean()
    if mean <= 0:  # no input was ever different from 0: plain rounding
        return torch.eye(len(second), device=second.device)
    while True:
        damped = second.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        if damping >= MOST_DAMPING:
            raise InvalidArgument("calibration: the second moments of this layer's inputs cannot be factorized")
        damping = min(damping * 10, MOST_DAMPING)


def _in_order(
    q: Tensor, scales: Tensor, zeros: Tensor, order: Tensor, columns: int, scheme: Scheme, *, gathered: bool
) -> QuantizedWeight:
    """The weight, from q [K, N] in the order in which columns were rounded. Columns of a group come by their number."""
    if not gathered:
        return assemble(q[order.argsort()].T, scales, zeros, scheme)
    within = order.unflatten(0, (-1, columns)).argsort(-1)
    places = (within + torch.arange(len(within), device=order.device)[:, None] * columns).flatten()
    return assemble(q[places].T, scales, zeros, scheme, perm=order[places])
