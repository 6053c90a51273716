"""What a model's attention layers look like to the KV cache: sizes, kinds, block groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch

QUANTIZED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}  # EngineConfig.kv_dtype -> what the cache holds
_SCALE_BYTES = 8  # of a quantized key and value of one head: a float32 each


def kv_dtype_of(name: str | None, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a cache, from EngineConfig.kv_dtype."""
    if name is None:
        return model_dtype
    return QUANTIZED.get(name) or getattr(torch, name)


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer, as seen when the model ran. A layer that attends several times in a forward is several.

    Attributes:
        layer_idx: the number the model gives its layer.
        num_heads: query heads present on this device.
        num_kv_heads: key/value heads present on this device.
        head_dim: size of a query or key head.
        value_dim: size of a value head.
        window: None, or the number of latest positions a query sees, its own included.
        chunk: None, or the length of the runs of positions of which a query sees its own only.
        call: which of the layer's attentions this is, in the order they run.
        value_in_key: whether a token's value is the first part of its key (latents), so that one copy can do for both.
    """

    layer_idx: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    chunk: int | None = None
    call: int = 0
    value_in_key: bool = False

    def bytes_per_token(self, dtype: torch.dtype, *, values_in_keys: bool = False) -> int:
        dims = self.head_dim + (0 if values_in_keys and self.value_in_key else self.value_dim)
        scales = _SCALE_BYTES if dtype in QUANTIZED.values() else 0
        return self.num_kv_heads * (dims * dtype.itemsize + scales)


@dataclass(frozen=True)
class BlockGroup:
    """Layers that see the same positions, so that one block table serves them all.

    Attributes:
        values_in_keys: whether values that are part of their keys are kept as that; else they have memory of their own.
    """

    window: int | None
    chunk: int | None
    layers: tuple[LayerSpec, ...]
    values_in_keys: bool = False

    def bytes_per_block(self, block_size: int, dtype: torch.dtype) -> int:
        kept = self.values_in_keys
        return block_size * sum(layer.bytes_per_token(dtype, values_in_keys=kept) for layer in self.layers)


def group_layers(layers: list[LayerSpec], *, values_in_keys: bool) -> list[BlockGroup]:
    """Groups by window and chunk, in the order they first appear; see BlockGroup for `values_in_keys`."""
    kinds: dict[tuple, list[LayerSpec]] = {}
    for layer in layers:
        kinds.setdefault((layer.window, layer.chunk), []).append(layer)
    return [BlockGroup(*kind, tuple(members), values_in_keys) for kind, members in kinds.items()]


def slots_for_budget(slot_bytes: int, budget: int, max_num_seqs: int) -> int:
    """Most state slots within `budget` bytes: enough for all running sequences and as many rows held beside them.

    At least one, whatever the budget; none if there is no state.
    """
    if not slot_bytes:
        return 0
    return max(1, min(2 * max_num_seqs, budget // slot_bytes))


def blocks_for_budget(
    groups: list[BlockGroup],
    *,
    budget: int,
    block_size: int,
    dtype: torch.dtype,
    max_batch_tokens: int,
    max_num_seqs: int,
) -> list[int]:
    """Most blocks of each group so that together they stay within `budget` bytes.

    A group with a window or chunk never needs more than that and one step's tokens for every running sequence, so it
    is capped there and full groups take the rest. At least one block each, whatever the budget.
    """
    sizes = [group.bytes_per_block(block_size, dtype) for group in groups]
    spans = [group.window or group.chunk for group in groups]
    caps = [
        None
        if span is None
        else max_num_seqs * (-(-(span + block_size) // block_size) + 1) + -(-max_batch_tokens // block_size)
        for span in spans
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
