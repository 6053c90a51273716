"""How much memory there is for the KV cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

CPU_FRACTION = 0.4  # the rest of a CPU's memory belongs to weights, activations and the user's own work
CUDA_FRACTION = 0.9  # of all there is; the rest is for what other libraries and processes come to need


def free_memory() -> int:
    """Bytes of the machine's memory that could be allocated now; on Linux the container's limit counts too."""
    readings = [value for value in (_meminfo_available(), _cgroup_available()) if value is not None]
    if readings:
        return min(readings)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # no such reading on this system
        return 4 << 30


class MemoryMeter(Protocol):
    """What a device's memory is used for, in bytes."""

    def total(self) -> int:
        """All there is."""
        ...

    def in_use(self) -> int:
        """By anybody, this process and others; not what torch keeps for reuse."""
        ...

    def peak(self, run: Callable[[], None]) -> int:
        """Most that `run` had in use at a time, beyond what was before."""
        ...


class CudaMeter:
    """The memory of a CUDA device. A `MemoryMeter`."""

    def __init__(self, device: torch.device):
        self._device = device

    def total(self) -> int:
        return torch.cuda.mem_get_info(self._device)[1]

    def in_use(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        reusable = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return total - free - reusable

    def peak(self, run: Callable[[], None]) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_reserved(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device) - before  # with what is lost between tensors


def _meminfo_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _cgroup_available() -> int | None:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return None if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return None
