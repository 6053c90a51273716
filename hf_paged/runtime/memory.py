"""How much memory there is for the KV cache."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CPU_FRACTION = 0.4  # the rest of a CPU's memory belongs to weights, activations and the user's own work
CUDA_FRACTION = 0.85


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now; on Linux the container's limit counts too."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    readings = [value for value in (_meminfo_available(), _cgroup_available()) if value is not None]
    if readings:
        return min(readings)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # no such reading on this system
        return 4 << 30


def default_fraction(device: torch.device) -> float:
    return CUDA_FRACTION if device.type == "cuda" else CPU_FRACTION


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
