"""AWQ: scaling up the inputs' channels that matter before rounding, and cutting off what makes grids coarse.

Lin, Tang, Tang, Yang, Dang, Han: AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (MLSys
2024). Layers that share an input x get weights W diag(s) and the input x / s, which what comes before them can produce
itself. s = magnitude^ratio, with the ratio for which the rounded layers' outputs are off least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_paged_kernels.quantized import QuantizedWeight

from .moments import Moments, error
from .rounding import Grid, Scheme, assemble, fit

RATIOS = tuple(step / 20 for step in range(20))
CLIPS = tuple(1 - 0.05 * step for step in range(11))  # the range of a group's grid, as a share of that of its values


def search_scales(
    weights: Sequence[Tensor], moments: Moments, scheme: Scheme, share: Callable[[Tensor], Tensor] = lambda values: values
) -> Tensor:
    """s [K] for layers of weights [N, K] that share an input: ones if nothing is better.

    `share`: [K] -> [K], averages values over the channels of the input that must have the same scale.
    """
    second, magnitude = moments.second, share(moments.magnitude).clamp(min=1e-8)
    joined = torch.cat([weight.float() for weight in weights])
    best, least = torch.ones_like(magnitude), None
    for ratio in RATIOS:
        scales = magnitude**ratio
        scales = scales / (scales.amax() * scales.amin()).sqrt()
        scaled = joined * scales
        groups = scaled.unflatten(-1, (-1, scheme.columns(scaled.shape[-1])))
        rounded = fit(groups, scheme).rounded(groups).flatten(-2)
        loss = error(rounded.div_(scales).sub_(joined), second).sum()
        if least is None or loss < least:
            best, least = scales, loss
    return best


def round_clipped(weight: Tensor, moments: Moments, scheme: Scheme) -> QuantizedWeight:
    """weight [N, K] rounded to grids whose ranges were searched, group by group, for the least error of the output.

    A row keeps its whole ranges where the searched ones, all together, are no better.
    """
    second = moments.second
    groups = weight.float().unflatten(-1, (-1, scheme.columns(weight.shape[-1])))  # [N, G, columns]
    plain = fit(groups, scheme)
    clipped = _search_clips(groups, second, scheme)
    errors = [error((grid.rounded(groups) - groups).flatten(-2), second) for grid in (plain, clipped)]
    better = (errors[1] < errors[0])[:, None, None]
    grid = Grid(
        torch.where(better, clipped.scales, plain.scales), torch.where(better, clipped.zeros, plain.zeros), plain.largest
    )
    return assemble(grid.nearest(groups).flatten(-2), grid.scales[..., 0].T, grid.zeros[..., 0].T, scheme)


def _search_clips(groups: Tensor, second: Tensor, scheme: Scheme) -> Grid:
    """Each group's best grid, by its own part of the output alone."""
    columns = groups.shape[-1]
    blocks = torch.stack([second[at : at + columns, at : at + columns] for at in range(0, len(second), columns)])
    lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best, least = fit(groups, scheme), None
    for clip in CLIPS:
        grid = fit(groups, scheme, lowest=lowest * clip, highest=highest * clip)
        difference = (grid.rounded(groups) - groups).transpose(0, 1)  # [G, N, columns]
        loss = error(difference, blocks).T[..., None]
        better = loss < (torch.inf if least is None else least)
        least = loss if least is None else torch.where(better, loss, least)
        best = Grid(torch.where(better, grid.scales, best.scales), torch.where(better, grid.zeros, best.zeros), best.largest)
    return best
