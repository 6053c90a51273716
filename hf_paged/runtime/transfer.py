"""Small tensors between host and device without waiting for the device.

A copy from or to ordinary host memory waits for everything the device has to do before it. From and to pinned memory it
takes its turn in the stream, and torch keeps the memory until it is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.tensor(values)` on `device`."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host. Whoever reads it waits for the device to have got so far."""

    __slots__ = ("_arrived", "_host")

    def __init__(self, tensor: torch.Tensor):
        self._host, self._arrived = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> None:
        """Return when it has arrived. Raises what went wrong on the device before."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def tolist(self) -> list:
        self.wait()
        return self._host.tolist()
