"""What the compile gate compiles: launchers of every kernel on tensors of real shapes, which are never read.

Add a Case for each variant that compiles to different code and matters: head sizes, dtypes, the tiles of few and many rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hf_paged_kernels import ops


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        name: unique; the table's first column.
        run: calls the launcher on CPU tensors. Every launch it makes is compiled, and is a line of the table.
        mma: architecture -> instruction that must be in the machine code of one of its kernels ("HGMMA" is wgmma).
        without: architecture -> why it is not compiled there.
    """

    name: str
    run: Callable[[], object]
    mma: dict[str, str] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)


def copy_blocks() -> None:
    cache = ops.allocate_kv(64, 8, 128, 128, 64, torch.bfloat16, "cpu", backend="triton")
    ops.copy_blocks(*cache, torch.empty(3, 2, dtype=torch.int64), backend="triton")


CASES = [
    Case("copy_blocks", copy_blocks),
]
