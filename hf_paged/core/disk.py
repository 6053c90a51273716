"""A disk behind host memory, as the scheduler sees it.

Prefixes that are evicted from host memory are written there (`TierMoves.spilled`). A waiting sequence that goes on in the
disk's blocks where those of the cache end is held back until they were read, others going before it; with the next step they are
put into host slots (`TierMoves.read`), from where they go the way of all that is there. What could not be read is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

MOST_READINGS = 4  # sequences whose blocks are read, or wait in memory of their own for a step


class Reading(Protocol):
    """Blocks on their way from the disk."""

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        ...

    def blocks(self) -> Iterator[tuple[int, bytes, object]]:
        """Group, key and contents of those that came, once it is `done`."""
        ...


class Disk(Protocol):
    """Where blocks may lie beside the host's memory. Nobody waits for it."""

    def holds(self, group: int, key: bytes) -> bool:
        """Whether a block is thought to lie there; whether it is still sound, only reading it tells."""
        ...

    def read(self, wanted: Iterable[tuple[int, bytes]]) -> Reading:
        """Begin to read blocks, each a (group, key)."""
        ...


class OnDisk:
    """The disk's blocks of one group. A `Findable`: whoever finds one has to read it first."""

    def __init__(self, disk: Disk, group: int):
        self._disk, self._group = disk, group

    def lookup(self, key: bytes) -> int | None:
        return 0 if self._disk.holds(self._group, key) else None
