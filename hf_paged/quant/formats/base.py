"""What a checkpoint format says about one linear layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_paged_kernels.quantized import QuantizedWeight, pack, words_of

from ...base.errors import InvalidArgument

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Stored:
    """One tensor as a checkpoint has it.

    Attributes:
        shape: as stored.
        dtypes: those it may have; the first is the usual one.
        optional: whether a checkpoint may leave it out.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


class Format(ABC):
    """The stored tensors of a linear layer with a weight [N, K], and the way to the kernels' layout and back.

    Instances are frozen dataclasses of what the checkpoint's config says; `str` of one is for people. Errors are `InvalidArgument`s whose messages
    begin with what is wrong ("group_size", "qweight"); the caller puts the layer's name before it.
    """

    @abstractmethod
    def stored(self, N: int, K: int) -> dict[str, Stored]:
        """Name after the layer's own ("qweight") -> what is stored. Raises InvalidArgument for sizes it cannot hold."""

    def check(self, tensors: dict[str, Tensor], N: int, K: int) -> None:
        """Raises InvalidArgument if a tensor is missing or has another shape or type than the format says."""
        for name, stored in self.stored(N, K).items():
            tensor = tensors.get(name)
            if tensor is None:
                if not stored.optional:
                    raise InvalidArgument(f"{name} is missing")
            elif tensor.shape != stored.shape:
                raise InvalidArgument(f"{name} has shape {list(tensor.shape)}, not {list(stored.shape)}")
            elif tensor.dtype not in stored.dtypes:
                raise InvalidArgument(f"{name} is {tensor.dtype}, not {' or '.join(map(str, stored.dtypes))}")

    @abstractmethod
    def pack(self, tensors: dict[str, Tensor], N: int, K: int) -> QuantizedWeight:
        """The kernels' layout of tensors whose names, shapes and types have been checked; those that are optional may
        be missing. Raises InvalidArgument for values that no such layer can have."""

    @abstractmethod
    def unpack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """What `pack` was given, as a checkpoint stores it."""


def check_group_size(size) -> None:
    """Raises InvalidArgument unless it is a number of input features, or -1 for all."""
    if not isinstance(size, int) or size < 1 and size != -1:
        raise InvalidArgument(f"group_size must be positive or -1, not {size!r}")


def groups_text(size: int) -> str:
    """What shares a scale, for people."""
    return "a scale a row" if size == -1 else f"groups of {size}"


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor. Raises InvalidArgument if it has a value that is infinite or no number."""
    if not torch.isfinite(tensor).all():
        raise InvalidArgument(f"{name} has values that are not finite")
    return tensor


def packed_rows(bits: int, N: int, K: int, values: Callable[[slice], Tensor], device: torch.device) -> Tensor:
    """The data of a QuantizedWeight of kind int2, int3, int4 or int8, from `values`: rows -> uint8 [rows, K], of 8 bits
    128 too much. A few rows at a time (a multiple of 8), so that little more memory is needed than for the result."""
    step = max(8, (1 << 17) // K * 8)
    width, dtype = (K, torch.int8) if bits == 8 else (words_of(f"int{bits}", K), torch.int32)
    data = torch.empty(N, width, dtype=dtype, device=device)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        found = values(rows)
        data[rows] = (found ^ 0x80).view(torch.int8) if bits == 8 else pack(found, f"int{bits}")
    return data


def unsigned(weight: QuantizedWeight) -> Tensor:
    """q [N, K] of a weight of `packed_rows`, uint8, of 8 bits 128 too much again."""
    return weight.values() if weight.is_packed else weight.data.view(torch.uint8) ^ 0x80


def in_groups(name: str, g_idx: Tensor, size: int) -> Tensor | None:
    """The stable order that brings the groups together, int32 [K]; None if they are.

    Raises InvalidArgument if not every group has `size` members.
    """
    groups = len(g_idx) // size
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise InvalidArgument(f"{name} has groups {int(g_idx.min())} to {int(g_idx.max())} where there are {groups}")
    counts = torch.bincount(g_idx, minlength=groups)
    if (counts != size).any():
        raise InvalidArgument(
            f"{name} puts {int(counts.min())} to {int(counts.max())} features in a group; only groups of equal sizes "
            f"(here {size}) are supported"
        )
    order = torch.argsort(g_idx, stable=True).to(torch.int32)
    return None if (order == torch.arange(len(order), device=order.device)).all() else order
