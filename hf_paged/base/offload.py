"""What an engine may use beside the device's memory for keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidArgument
from .sizes import parse_bytes


@dataclass(frozen=True)
class Offload:
    """Memory of the host behind the KV cache (`EngineConfig.offload`).

    Prefixes that are evicted from the cache go there, and come back when a prompt begins with them. So does what a
    preempted sequence had computed, where copying it is expected to take less time than computing it again.

    Attributes:
        memory: most bytes, as an int or a string such as "4GiB". They are taken as they are needed; on CUDA they are
            pinned.

    Raises InvalidArgument for a size that is none.
    """

    memory: int | str

    def __post_init__(self):
        object.__setattr__(self, "memory", parse_bytes("offload", self.memory))


def offload_of(value: Offload | int | str) -> Offload:
    """`value` of EngineConfig.offload as an Offload; a size is its `memory`."""
    if isinstance(value, (int, str)):
        return Offload(value)
    if not isinstance(value, Offload):
        raise InvalidArgument(f'offload must be a size such as "4GiB" or an Offload, got {value!r}')
    return value
