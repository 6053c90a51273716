"""top-k, top-p and min-p with transformers' own keep rules, in two forms that keep the same tokens.

`warp_dense` is transformers' arithmetic with one parameter per row; top-p sorts the vocabulary. `narrow` looks only
at a row's largest logits, and says where it cannot be sure (a cut closer than fp32 can tell, a tie across the cut,
too little mass among the candidates): those rows are for `warp_dense`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_NEG_INF = float("-inf")
WIDTHS = (64, 256, 1024)  # candidates `narrow` looks at: first try, second, third
_BLOCK = 64  # columns per block when blocks are compared by their maxima
_CUM_MARGIN = 5e-7  # transformers' fp32 cumulative sums are at most about this far from exact ones
_RATIO_MARGIN = 2e-6


class WarpParams(NamedTuple):
    """Per-row options as tensors [R] on the logits' device: top_k int64 (0: off), top_p and min_p float64."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def rows(self, index: torch.Tensor) -> WarpParams:
        return WarpParams(self.top_k[index], self.top_p[index], self.min_p[index])


class Candidates(NamedTuple):
    """A row's kept tokens, by ascending logit.

    `logits_RC` is -inf where removed, `ids_RC` int64, `certain_R` false where the row needs `warp_dense`.
    """

    logits_RC: torch.Tensor
    ids_RC: torch.Tensor
    certain_R: torch.Tensor


def row_argmax(x_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(index of each row's first maximum, the maximum); NaN counts as largest. As `argmax`, several times faster on CPU.

    Maxima vectorise where argmax does not: take block maxima, then search one block.
    """
    num_blocks = x_RV.shape[1] // _BLOCK
    if x_RV.device.type != "cpu" or num_blocks < 8:
        index = x_RV.argmax(-1)
        return index, x_RV.gather(1, index[:, None])[:, 0]
    blocks = x_RV[:, : num_blocks * _BLOCK].unflatten(1, (num_blocks, _BLOCK))
    block = blocks.amax(-1).argmax(-1)
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK))[:, 0]
    offset = inside.argmax(-1)
    value, index = inside.gather(1, offset[:, None])[:, 0], block * _BLOCK + offset
    tail = x_RV[:, num_blocks * _BLOCK :]
    if tail.shape[1]:
        last = tail.argmax(-1)
        last_value = tail.gather(1, last[:, None])[:, 0]
        better = (last_value > value) | (last_value.isnan() & ~value.isnan())
        value = torch.where(better, last_value, value)
        index = torch.where(better, last + num_blocks * _BLOCK, index)
    return index, value


def row_topk(x_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, ids) of the k largest, descending. As `topk`; on CPU it first picks the k blocks with largest maxima."""
    vocab_size = x_RV.shape[1]
    num_blocks = vocab_size // _BLOCK
    if x_RV.device.type != "cpu" or num_blocks < 3 * k:
        return x_RV.topk(k)
    tail_start = num_blocks * _BLOCK
    blocks = x_RV[:, :tail_start].unflatten(1, (num_blocks, _BLOCK))
    best = blocks.amax(-1).topk(k, sorted=False).indices
    values = blocks.gather(1, best[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    values = torch.cat([values, x_RV[:, tail_start:]], dim=1)
    values, place = values.topk(k)
    block = best.gather(1, (place // _BLOCK).clamp_(max=k - 1))
    ids = torch.where(place < k * _BLOCK, block * _BLOCK + place % _BLOCK, place - k * _BLOCK + tail_start)
    return values, ids


def narrow(x_RV: torch.Tensor, params: WarpParams, width: int) -> Candidates:
    """Apply top-k, top-p and min-p looking at the `width` largest logits of each row.

    Args:
        x_RV: fp32 logits after temperature; each row's maximum is finite. Not modified.
        params: every row has 0 < top_k < width, or no top_k but top_p < 1 or min_p > 0.
        width: less than V.
    """
    values, ids = row_topk(x_RV, width)
    values, ids = values.flip(-1), ids.flip(-1)
    limited, by_mass = params.top_k > 0, params.top_p < 1.0
    kth = values.gather(1, (width - params.top_k).clamp_(max=width - 1)[:, None])
    kth = kth.masked_fill(~limited[:, None], _NEG_INF)
    removed = values < kth
    certain = ~limited | (values[:, 0] < kth[:, 0])  # else ties of the k-th may lie outside the window

    ratio = (values.double() - values[:, -1:].double()).exp_()
    mass = ratio.masked_fill(removed, 0.0)
    total, outside = _totals(x_RV, values[:, -1:], mass, by_mass & ~limited)
    probability = mass / total[:, None]
    cumulative = outside[:, None] + probability.cumsum(-1)
    cut, sure = _top_p_cut(values, cumulative, removed, outside, limited, params.top_p)
    certain &= sure
    low = ratio < params.min_p[:, None]
    close = (ratio - params.min_p[:, None]).abs() < _RATIO_MARGIN * params.min_p[:, None]
    certain &= ~(close & (ratio < 1.0)).any(-1)
    certain &= limited | by_mass | low[:, 0]  # min-p alone: the last kept token must lie inside the window
    return Candidates(values.masked_fill(removed | cut | low, _NEG_INF), ids, certain)


def _totals(x_RV, peak_R1, mass_RC, open_R) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of exp(x - peak), share of it outside the window), float64 [R]; only `open_R` rows look outside."""
    inside = mass_RC.sum(-1)
    outside = torch.zeros_like(inside)
    for row in open_R.nonzero()[:, 0].tolist():  # one at a time: the temporary stays in the cache
        everything = (x_RV[row] - peak_R1[row]).exp_().sum(dtype=torch.float64)
        outside[row] = (1.0 - inside[row] / everything).clamp_(min=0.0)
        inside[row] = everything
    return inside, outside


def _top_p_cut(values, cumulative, removed, outside, limited, top_p) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens top-p removes, rows where that is certain). The last column, the most likely token, always stays."""
    limit = (1.0 - top_p)[:, None]
    active = top_p < 1.0
    cut = (cumulative <= limit) & active[:, None]
    cut[:, -1] = False
    close = ((cumulative - limit).abs() < _CUM_MARGIN) & ~removed
    close[:, -1] = False
    split_tie = (cut[:, :-1] & ~cut[:, 1:] & ~removed[:, :-1] & (values[:, :-1] == values[:, 1:])).any(-1)
    open_end = ~limited & (~cut[:, 0] | (outside > limit[:, 0] - _CUM_MARGIN))  # the cut may lie outside the window
    return cut, ~active | ~(close.any(-1) | split_tie | open_end)


def warp_dense(x_RV: torch.Tensor, params: WarpParams, rows: list) -> None:
    """transformers' TopK, TopP and MinP warpers (min_tokens_to_keep=1), in place.

    `rows` holds the rows' SamplingParams: which rows have which option is decided without asking the device.
    """
    index, selected = _having(x_RV, [p.top_k > 0 for p in rows])
    if selected is not None:
        k = params.top_k[index].clamp_(max=x_RV.shape[1])
        largest = min(max(p.top_k for p in rows), x_RV.shape[1])
        kth = selected.topk(largest).values.gather(1, k[:, None] - 1)
        x_RV[index] = selected.masked_fill(selected < kth, _NEG_INF)
    index, selected = _having(x_RV, [p.top_p < 1.0 for p in rows])
    if selected is not None:
        ordered, order = selected.sort(-1)
        cut = ordered.softmax(-1).cumsum(-1) <= (1.0 - params.top_p[index]).float()[:, None]
        cut[:, -1] = False
        x_RV[index] = selected.masked_fill(cut.scatter(1, order, cut), _NEG_INF)
    index, selected = _having(x_RV, [p.min_p > 0.0 for p in rows])
    if selected is not None:
        probability = selected.softmax(-1)
        low = probability < params.min_p[index].float()[:, None] * probability.amax(-1, keepdim=True)
        x_RV[index] = selected.masked_fill(low, _NEG_INF)


def _having(x_RV: torch.Tensor, flags: list[bool]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    chosen = [index for index, flag in enumerate(flags) if flag]
    if not chosen:
        return None, None
    index = torch.tensor(chosen).to(x_RV.device)
    return index, x_RV[index]
