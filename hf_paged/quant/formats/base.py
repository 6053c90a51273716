"""What a checkpoint format says about one linear layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_paged_kernels.quantized import QuantizedWeight

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

    Instances are frozen dataclasses of what the checkpoint's config says. Errors are `InvalidArgument`s whose messages
    begin with what is wrong ("group_size", "qweight"); the caller puts the layer's name before it.
    """

    @abstractmethod
    def stored(self, N: int, K: int) -> dict[str, Stored]:
        """Name after the layer's own ("qweight") -> what is stored. Raises InvalidArgument for sizes it cannot hold."""

    @abstractmethod
    def pack(self, tensors: dict[str, Tensor], N: int, K: int) -> QuantizedWeight:
        """The kernels' layout of tensors whose names, shapes and types have been checked; those that are optional may be
        missing. Raises InvalidArgument for values that no such layer can have."""

    @abstractmethod
    def unpack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """What `pack` was given, as a checkpoint stores it."""
