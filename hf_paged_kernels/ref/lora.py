"""Low-rank terms of several adapters in plain torch."""

from __future__ import annotations

from torch import Tensor


def add_terms_(y: Tensor, x: Tensor, tiles, site) -> None:
    """y [T, N], x [T, K] (or int64 [T]): see `lora.add_terms_`. Computed in the terms' type, rounded once."""
    for slot, rows in tiles.rows.items():
        column = 0
        for size, terms in zip(site.sizes, site.terms.get(slot, [None] * len(site.sizes))):
            if terms is not None:
                part = y[rows, column : column + size]
                y[rows, column : column + size] = _changed(part, x[rows], terms, site.looks_up).to(y.dtype)
            column += size


def _changed(y: Tensor, x: Tensor, terms, looks_up: bool) -> Tensor:
    if terms.scale is not None:
        y = y * terms.scale
    if terms.shift is not None:
        y = y + terms.shift
    if terms.B is not None:
        h = terms.A[x] if looks_up else x.to(terms.A.dtype) @ terms.A.T
        y = y + h @ terms.B
    return y
