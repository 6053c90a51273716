"""What low-rank adapters add to a layer's output, in a batch whose rows belong to different ones.

    y[row] = scale * y[row] + shift + (x[row] A^T) B        A [r, K], B [r, N], scale and shift [N] of the row's adapter

Adapters have slots, small numbers. Which rows are whose is said once a step (`RowTiles`); what the adapters add to a
layer lies in a `Site`. Kernels find both through tensors that stay where they are, so that a CUDA graph holds any mix of
adapters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from . import ops

TILE_ROWS = 16  # of one adapter, at most, that are multiplied together
FIELDS = 5  # of a table's entry: the addresses of A and B, the rank, the addresses of scale and shift
_FIRST_SLOTS = 8


def terms_dtype(dtype: torch.dtype, device: torch.device, backend: str = "auto") -> torch.dtype:
    """The type that `Terms` of a model in `dtype` are kept in: the model's own for Triton's kernels, else fp32, as PEFT's."""
    return dtype if ops.resolve_backend(backend, device) == "triton" else torch.float32


@dataclass(frozen=True, slots=True)
class Terms:
    """What one adapter adds to one layer.

    Attributes:
        A: [r, K]; of a layer that looks rows up, [V, r]. None where the adapter has no low-rank product here.
        B: [r, N], with every factor in it.
        scale: [N], what the layer's own output is multiplied by; None for 1.
        shift: [N], what is added; None for 0.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.B is None else len(self.B)

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.tensors())

    def tensors(self) -> list[Tensor]:
        return [part for part in (self.A, self.B, self.scale, self.shift) if part is not None]


class Site:
    """A layer, or several of one input that are computed as one, with what each adapter adds to it.

    Args:
        sizes: output features of each of the layers, whose outputs lie side by side.
        dtype: of all terms.
        looks_up: whether the layer is an embedding: A's rows are looked up, by the number in x.

    Attributes:
        table: int64 [slots, layers, FIELDS] on the device, zeros where an adapter adds nothing. It is written in place.
        max_rank: the highest there has been: what kernels have room for.
    """

    def __init__(
        self, sizes: Iterable[int], device: torch.device, dtype: torch.dtype = torch.float32, *, looks_up: bool = False
    ):
        self.sizes = tuple(sizes)
        self.dtype = dtype
        self.looks_up = looks_up
        self.max_rank = 0
        self.terms: dict[int, tuple[Terms | None, ...]] = {}
        self.table = torch.zeros(_FIRST_SLOTS, len(self.sizes), FIELDS, dtype=torch.int64, device=device)

    def put(self, slot: int, terms: tuple[Terms | None, ...]) -> None:
        """What the adapter of `slot` adds to each layer. The tensors are kept, contiguous and on the table's device."""
        assert len(terms) == len(self.sizes)
        assert all(tensor.dtype == self.dtype for part in terms if part is not None for tensor in part.tensors())
        while slot >= len(self.table):
            self.table = torch.cat([self.table, torch.zeros_like(self.table)])
        self.terms[slot] = terms
        self.table[slot] = torch.tensor([_entry(part) for part in terms], dtype=torch.int64)
        self.max_rank = max(self.max_rank, *(part.rank for part in terms if part is not None), 0)

    def remove(self, slot: int) -> None:
        self.terms.pop(slot, None)
        if slot < len(self.table):
            self.table[slot] = 0

    @cached_property
    def width(self) -> int:
        """Outputs of all layers."""
        return sum(self.sizes)

    @cached_property
    def columns(self) -> Tensor:
        """int64 [layers + 1] on the device: where each layer's outputs begin."""
        return torch.tensor([0, *np.cumsum(self.sizes)], dtype=torch.int64, device=self.table.device)


def _entry(terms: Terms | None) -> list[int]:
    if terms is None:
        return [0] * FIELDS
    address = lambda part: 0 if part is None else part.data_ptr()  # noqa: E731
    return [address(terms.A), address(terms.B), terms.rank, address(terms.scale), address(terms.shift)]


@dataclass(slots=True)
class RowTiles:
    """The rows of a batch by adapter.

    Attributes:
        num_rows: of the batch.
        order: int32 [R], the rows that have an adapter, those of one side by side.
        tiles: int32 [n, 3] of (slot, first entry of `order`, how many: at most TILE_ROWS). Where they are padding, none.
        rows: slot -> its rows, int64 on the batch's device. None: only the device knows; see `rows_on_device`.
    """

    num_rows: int
    order: Tensor
    tiles: Tensor
    rows: dict[int, Tensor] | None


def num_tiles(num_rows: int, num_adapters: int) -> int:
    """The most tiles that so many rows of so many adapters make."""
    return min(num_rows, num_adapters + num_rows // TILE_ROWS)


def rows_on_device(y: Tensor, x: Tensor, site: Site, backend: str = "auto") -> bool:
    """Whether `add_terms_` reads which rows are whose on the device, and so needs no `RowTiles.rows`."""
    return ops.resolve_backend(backend, y.device) == "triton" and x.dtype == y.dtype == site.dtype


def tile_rows(slots: np.ndarray, device: torch.device) -> RowTiles:
    """The rows of a batch by adapter.

    Args:
        slots: [T] the slot of every row's adapter; below 0 for none.
    """
    order, tiles, rows = tile_numbers(slots)
    return RowTiles(
        len(slots),
        torch.from_numpy(order).to(device),
        torch.from_numpy(tiles).to(device),
        {slot: torch.from_numpy(own).to(device) for slot, own in rows.items()},
    )


def tile_numbers(slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """(order, tiles, rows by slot) of RowTiles, as numpy arrays."""
    order = np.argsort(slots, kind="stable")
    order = order[np.searchsorted(slots[order], 0) :]
    found, starts = np.unique(slots[order], return_index=True)
    ends = [*starts[1:], len(order)]
    tiles = [
        (slot, first, min(TILE_ROWS, end - first))
        for slot, start, end in zip(found.tolist(), starts.tolist(), ends)
        for first in range(start, end, TILE_ROWS)
    ]
    rows = {slot: order[start:end] for slot, start, end in zip(found.tolist(), starts.tolist(), ends)}
    return order.astype(np.int32), np.asarray(tiles, dtype=np.int32).reshape(-1, 3), rows


def add_terms_(y: Tensor, x: Tensor, tiles: RowTiles, site: Site, *, backend: str = "auto") -> Tensor:
    """Change y, a layer's own output, into its adapters' (see above). Returns y.

    A row's bits depend on that row and its adapter alone, on CPU in fp32; sums are in fp32 in any case.

    Args:
        y: [..., N] with N the sum of the site's sizes, as many rows as `tiles` says, contiguous.
        x: [..., K] what the layer was given; of one that looks up, int64 [...].

    Raises ValueError if x or y have another number of rows.
    """
    num_rows = x.numel() if site.looks_up else x.numel() // max(x.shape[-1], 1)
    width = site.width
    if num_rows != tiles.num_rows or y.numel() != num_rows * width or y.shape[-1] != width:
        raise ValueError(
            f"adapters know of {tiles.num_rows} rows of {width} outputs; the layer was given {num_rows} and returned "
            f"{list(y.shape)}"
        )
    if not len(tiles.tiles):
        return y
    rows = y.view(-1, width)
    x = x.reshape(-1) if site.looks_up else x.reshape(-1, x.shape[-1])
    _kernels(backend, y.device, x.dtype, y.dtype, site.dtype).add_terms_(rows, x, tiles, site)
    return y


@cache
def _kernels(backend: str, device: torch.device, x: torch.dtype, y: torch.dtype, terms: torch.dtype):
    """The module with the kernels for inputs, outputs and terms of these types; remembered, for every layer asks."""
    name = ops.resolve_backend(backend, device)
    if name == "triton" and x == y == terms:
        from .triton import lora
    elif name == "cpu" and y == torch.float32:
        from .cpu import lora
    else:
        from .ref import lora
    return lora
