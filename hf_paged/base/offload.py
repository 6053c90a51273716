"""What an engine may use beside the device's memory for keys and values."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import InvalidArgument
from .sizes import parse_bytes


@dataclass(frozen=True)
class Offload:
    """Memory of the host behind the KV cache (`EngineConfig.offload`).

    Prefixes that are evicted from the cache go there, and come back when a prompt begins with them. So does what a
    preempted sequence had computed, where copying it is expected to take less time than computing it again.

    With `disk`, prefixes that are evicted from there, or are there when the engine closes, go to files, which the next
    engine of the same model finds, in this process or another.

    Attributes:
        memory: most bytes, as an int or a string such as "4GiB". They are taken as they are needed; on CUDA they are
            pinned.
        disk: a folder for prefixes; several engines may share it, of different models, too. Whoever may write to it
            decides what models say. None: no files.
        disk_memory: most bytes of the files in it, as `memory`; those not used for longest are deleted.

    Raises InvalidArgument for a size that is none, and for a disk that is no path.
    """

    memory: int | str
    disk: str | os.PathLike | None = None
    disk_memory: int | str = "20GiB"

    def __post_init__(self):
        object.__setattr__(self, "memory", parse_bytes("offload", self.memory))
        object.__setattr__(self, "disk_memory", parse_bytes("offload: disk_memory", self.disk_memory))
        if self.disk is not None:
            if not isinstance(self.disk, (str, os.PathLike)) or not os.fspath(self.disk):
                raise InvalidArgument(f"offload: disk must be the path of a folder, got {self.disk!r}")
            object.__setattr__(self, "disk", os.path.abspath(os.path.expanduser(os.fspath(self.disk))))


def offload_of(value: Offload | int | str) -> Offload:
    """`value` of EngineConfig.offload as an Offload; a size is its `memory`."""
    if isinstance(value, (int, str)):
        return Offload(value)
    if not isinstance(value, Offload):
        raise InvalidArgument(f'offload must be a size such as "4GiB" or an Offload, got {value!r}')
    return value
