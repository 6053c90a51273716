"""What a model's attention layers look like to the KV cache: sizes, kinds, block groups."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer, as seen when the model ran.

    Attributes:
        layer_idx: the number the model gives its layer.
        num_heads: query heads present on this device.
        num_kv_heads: key/value heads present on this device.
        head_dim: size of a query or key head.
        value_dim: size of a value head.
        window: None for full attention, else the number of latest positions a query sees, its own included.
    """

    layer_idx: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None

    def bytes_per_token(self, itemsize: int) -> int:
        return self.num_kv_heads * (self.head_dim + self.value_dim) * itemsize


@dataclass(frozen=True)
class BlockGroup:
    """Layers that see the same positions, so that one block table serves them all."""

    window: int | None
    layers: tuple[LayerSpec, ...]

    def bytes_per_block(self, block_size: int, itemsize: int) -> int:
        return block_size * sum(layer.bytes_per_token(itemsize) for layer in self.layers)


def group_layers(layers: list[LayerSpec]) -> list[BlockGroup]:
    """Groups by window, in the order the windows first appear."""
    windows = dict.fromkeys(layer.window for layer in layers)
    return [BlockGroup(window, tuple(layer for layer in layers if layer.window == window)) for window in windows]


def blocks_for_budget(
    groups: list[BlockGroup], *, budget: int, block_size: int, itemsize: int, max_batch_tokens: int, max_num_seqs: int
) -> list[int]:
    """Most blocks of each group so that together they stay within `budget` bytes.

    A sliding group never needs more than its window and one step's tokens for every running sequence, so it is
    capped there and full groups take the rest. At least one block each, whatever the budget.
    """
    sizes = [group.bytes_per_block(block_size, itemsize) for group in groups]
    caps = [
        None
        if group.window is None
        else max_num_seqs * (-(-(group.window + block_size) // block_size) + 1) + -(-max_batch_tokens // block_size)
        for group in groups
    ]
    if all(cap is not None for cap in caps):  # nothing else could use the rest
        caps = [None] * len(caps)
    counts = [0] * len(groups)
    open_groups = set(range(len(groups)))
    while open_groups:
        fixed = sum(counts[i] * sizes[i] for i in range(len(groups)) if i not in open_groups)
        share = max(1, (budget - fixed) // sum(sizes[i] for i in open_groups))
        capped = {i for i in open_groups if caps[i] is not None and share > caps[i]}
        for i in open_groups:
            counts[i] = caps[i] if i in capped else share
        if not capped:
            break
        open_groups -= capped
    return counts
