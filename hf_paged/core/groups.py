"""Which positions the layers of one block group see."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupSpec:
    """One block group: layers of one kind that share a block table. At most one of the two is set.

    window: a query at position p sees positions above p - window, its own included.
    chunk: positions are cut into runs of this length; a query sees those of its own run up to itself.
    """

    window: int | None = None
    chunk: int | None = None

    def __post_init__(self):
        assert self.window is None or self.chunk is None, "a window or a chunk"
        assert self.span is None or self.span >= 1, "a query sees at least itself"

    @property
    def span(self) -> int | None:
        """Most positions that a query sees; None: all."""
        return self.window if self.chunk is None else self.chunk

    def num_unseen_blocks(self, num_context: int, block_size: int) -> int:
        """Leading blocks that no query at position `num_context` or later can see."""
        if self.chunk is not None:
            return num_context // self.chunk * self.chunk // block_size
        if self.window is None or num_context < self.window:
            return 0
        return (num_context - self.window + 1) // block_size
