"""Tables of positions: where a model looks its positions up, a sequence ends with the table."""

from __future__ import annotations

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .watch import memory_of


class PositionTables(TorchFunctionMode):
    """While entered, notes the parameters and buffers of `model` in which its forward looks `positions` [n] up.

    Attributes:
        max_positions: how many positions the shortest table has; None if there is none.
    """

    def __init__(self, model: torch.nn.Module, positions: Tensor):
        super().__init__()
        self.positions = positions
        self.max_positions: int | None = None
        self._tables = {place for tensor in chain(model.parameters(), model.buffers()) for place in _places(tensor)}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _LOOKUPS and len(args) > 1:
            self._note(*_LOOKUPS[func](*args))
        return func(*args, **(kwargs or {}))

    def _note(self, table: Tensor, index) -> None:
        """A lookup of rows `index` of a table [rows, ...]."""
        index = index[0] if isinstance(index, tuple) and index else index
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.numel() != len(self.positions):
            return
        if self._tables.isdisjoint(_places(table)):
            return
        offsets = index.flatten() - self.positions.to(index.device)
        if bool((offsets == offsets[0]).all()):
            length = len(table) - int(offsets[0])
            self.max_positions = min(length, self.max_positions or length)


def _places(tensor: Tensor) -> list[int]:
    return [memory.untyped_storage().data_ptr() for memory in memory_of(tensor)]


_LOOKUPS = {  # function -> (table, index) of its arguments
    F.embedding: lambda index, table, *_: (table, index),
    Tensor.__getitem__: lambda table, index: (table, index),
    Tensor.index_select: lambda table, dim, index: (table, index if dim == 0 else None),
}
