"""Small tensors between host and device without waiting for the device.

A copy from or to ordinary host memory waits for everything the device has to do before it. From and to pinned memory it
takes its turn in the stream, and torch keeps the memory until it is done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch


def to_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.tensor(values)` on `device`."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor [N, ...] as uint8 [N, n] in the same memory, in whatever order its elements lie there."""
    order = sorted(range(1, tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(0, *order).view(len(tensor), math.prod(tensor.shape[1:])).view(torch.uint8)


class Milestone:
    """A point in the work of a device: all that was given to it so far. On a CPU it is passed already."""

    __slots__ = ("_event",)

    def __init__(self, device: torch.device):
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Return when the device has passed it. Raises what went wrong there before."""
        if self._event is not None:
            self._event.synchronize()


class HostCopy:
    """A tensor on its way to the host. Whoever reads it waits for the device to have got so far.

    On CPU it is the tensor itself, which nobody may change any more.
    """

    __slots__ = ("_arrived", "_host")

    def __init__(self, tensor: torch.Tensor):
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
        self._arrived = Milestone(tensor.device)

    def tolist(self) -> list:
        return self.numpy().tolist()

    def numpy(self) -> numpy.ndarray:
        self._arrived.wait()
        return self._host.numpy()
