"""Tables of positions: where a model looks its positions up, a sequence ends with the table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class PositionTables(TorchFunctionMode):
    """While entered, notes the tables in which a forward looks `positions` [n] (n > 1, ascending) up.

    Attributes:
        max_positions: how many positions the shortest table has; None if there is none.
    """

    def __init__(self, positions: Tensor):
        super().__init__()
        self.positions = positions
        self.max_positions: int | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _LOOKUPS and len(args) > 1:
            self._note(*_LOOKUPS[func](*args))
        return func(*args, **(kwargs or {}))

    def _note(self, index, rows: int) -> None:
        if not isinstance(index, Tensor) or index.is_floating_point() or index.numel() != len(self.positions):
            return
        offsets = index.flatten() - self.positions.to(index.device)
        if index.dtype != torch.bool and bool((offsets == offsets[0]).all()):
            length = rows - int(offsets[0])
            self.max_positions = min(length, self.max_positions or length)


_LOOKUPS = {  # function -> (index, rows of the table) of its arguments
    F.embedding: lambda index, table, *_: (index, len(table)),
    Tensor.__getitem__: lambda table, index: (
        index[0] if isinstance(index, tuple) and index else index,
        table.shape[0] if table.dim() else 0,
    ),
    torch.gather: lambda table, dim, index, *_: (index.select(-1, 0), table.shape[dim]),
    Tensor.index_select: lambda table, dim, index: (index, table.shape[dim]),
    torch.index_select: lambda table, dim, index, *_: (index, table.shape[dim]),
}
