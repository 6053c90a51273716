"""Low-rank terms of several adapters in fp32: see lora.cpp."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from ..lora import TILE_ROWS
from . import build


def add_terms_(y: Tensor, x: Tensor, tiles, site) -> None:
    """y [T, N] and x [T, K] (or int64 [T]) fp32 with contiguous rows: see `lora.add_terms_`."""
    num_tiles, parts, rank = len(tiles.tiles), len(site.sizes), max(site.max_rank, 1)
    hidden, given, stride, depth = None, None, 0, 0
    if site.looks_up:
        hidden_t = torch.empty(num_tiles, parts, TILE_ROWS, rank)
        _look_up(hidden_t, x, tiles, site)
        hidden = hidden_t.data_ptr()
    else:
        x = x if x.dtype == torch.float32 and x.stride(1) == 1 else x.float().contiguous()
        given, (stride, _), depth = x.data_ptr(), x.stride(), x.shape[1]
    _kernel()(given, stride, y.data_ptr(), y.stride(0), site.table.data_ptr(), tiles.order.data_ptr(),
              tiles.tiles.data_ptr(), num_tiles, site.columns.data_ptr(), parts, hidden, rank, depth)  # fmt: skip


def _look_up(hidden: Tensor, ids: Tensor, tiles, site) -> None:
    """The first product of an embedding's adapters: rows of A."""
    for place, (slot, first, count) in enumerate(tiles.tiles.tolist()):
        for part, terms in enumerate(site.terms.get(slot, ())):
            if terms is not None and terms.A is not None:
                rows = tiles.order[first : first + count].long()
                hidden[place, part, :count, : terms.rank] = terms.A[ids[rows]]


@cache
def _kernel():
    function = build.load().hfp_lora_f32
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, size, pointer, size, *[pointer] * 3, size, pointer, size, pointer, size, size]
    function.restype = None
    return function
