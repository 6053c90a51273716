"""The paged KV cache: one key and one value tensor a layer, cut into blocks, growing on demand; and slots for states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hf_paged_kernels import ops

from .layout import BlockGroup, LayerSpec
from .states import StateCache, StateSpec
from .transfer import as_bytes

if TYPE_CHECKING:
    from .host_cache import HostCache


class LayerCache:
    """One layer's pages, and which block group's table points into them.

    Attributes:
        scales: k_scale and v_scale, as the functions of `ops` take them; None unless the cache is quantized.
    """

    __slots__ = ("spec", "group", "k_cache", "v_cache", "scales")

    def __init__(self, spec: LayerSpec, group: int):
        self.spec = spec
        self.group = group
        self.k_cache: torch.Tensor | None = None
        self.v_cache: torch.Tensor | None = None
        self.scales: dict[str, torch.Tensor | None] = dict(k_scale=None, v_scale=None)


class KVCache:
    """Keys and values of every layer in blocks of `block_size` tokens.

    `ensure` grows a group to the number of blocks a plan asks for: block ids stay valid, contents are kept.
    `close` gives all memory back.

    Args:
        backend: the attention kernels that will use it, which decide how it lies in memory; see `ops.allocate_kv`.

    Attributes:
        states: the slots of layers that keep a state instead.
        host: memory of the host behind it; None: there is none.
        generation: counts how often keys and values moved to other memory.
    """

    def __init__(
        self,
        groups: list[BlockGroup],
        *,
        states: list[StateSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: str,
    ):
        self.backend = backend
        self.groups = groups
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.num_blocks = [0] * len(groups)
        self.generation = 0
        self.states = StateCache(states, device)
        self.host: HostCache | None = None
        self.layers = {
            (spec.layer_idx, spec.call): LayerCache(spec, index)
            for index, group in enumerate(groups)
            for spec in group.layers
        }

    def bytes_per_block(self, group: int) -> int:
        return self.groups[group].bytes_per_block(self.block_size, self.dtype)

    @property
    def layout(self) -> str:
        """What a block's bytes mean, as far as this object decides it."""
        return f"{self.groups} {self.block_size} {self.dtype} {self.backend}"

    @property
    def bytes_per_token(self) -> float:
        return sum(map(self.bytes_per_block, range(len(self.groups)))) / self.block_size

    @property
    def bytes_allocated(self) -> int:
        return sum(self.bytes_per_block(i) * count for i, count in enumerate(self.num_blocks))

    def ensure(self, num_blocks: list[int]) -> None:
        """Grow every group to at least `num_blocks[group]` blocks. Layer by layer, so little is held twice."""
        for index, count in enumerate(num_blocks):
            if count <= self.num_blocks[index]:
                continue
            for spec in self.groups[index].layers:
                self._grow_layer(self.layers[spec.layer_idx, spec.call], self.num_blocks[index], count)
            self.num_blocks[index] = count
            self.generation += 1

    def resize(self, num_blocks: list[int], moves: list[dict[int, int]]) -> None:
        """Make every group `num_blocks[group]` blocks, `moves[group]` being {old: new} of blocks to keep from beyond them.

        Layer by layer, so little is held twice. If memory does not suffice for that, what is needed stays: the blocks there
        were, up to those there are to be.
        """
        self.copy_blocks([_pairs(moved, self.device) for moved in moves])  # old and new places both exist now
        for index, count in enumerate(num_blocks):
            if count == self.num_blocks[index]:
                continue
            kept = self.num_blocks[index] = min(count, self.num_blocks[index])
            self.generation += 1
            for spec in self.groups[index].layers:
                self._grow_layer(self.layers[spec.layer_idx, spec.call], kept, count)
            self.num_blocks[index] = count
        self._give_back()

    def _grow_layer(self, layer: LayerCache, kept: int, new: int) -> None:
        """Give a layer `new` blocks, the first `kept` of which are those it had."""
        spec = layer.spec
        sizes = (new, spec.num_kv_heads, spec.head_dim, spec.value_dim, self.block_size)
        one_copy = spec.value_in_key and self.groups[layer.group].values_in_keys
        k_cache, v_cache = ops.allocate_kv(
            *sizes, self.dtype, self.device, values_in_keys=one_copy, backend=self.backend
        )
        k_scale, v_scale = ops.allocate_scales(v_cache)
        new_tensors = (k_cache, v_cache, k_scale, v_scale)
        for tensor, before in zip(new_tensors, (layer.k_cache, layer.v_cache, *layer.scales.values())):
            if kept and tensor is not None:
                tensor[:kept].copy_(before[:kept])
        layer.k_cache, layer.v_cache = k_cache, v_cache
        layer.scales = dict(k_scale=k_scale, v_scale=v_scale)

    def copy_blocks(self, copies: list[torch.Tensor | None]) -> None:
        """Copy whole blocks, `copies[group]` being int64 [n, 2] of (source, destination), or None."""
        for index, pairs in enumerate(copies):
            if pairs is None:
                continue
            for spec in self.groups[index].layers:
                layer = self.layers[spec.layer_idx, spec.call]
                ops.copy_blocks(layer.k_cache, layer.v_cache, pairs, **layer.scales, backend=self.backend)

    def parts(self, group: int) -> list[torch.Tensor]:
        """All that a group's blocks hold, each tensor of it as uint8 [blocks, n] in the same memory."""
        parts = []
        for spec in self.groups[group].layers:
            layer = self.layers[spec.layer_idx, spec.call]
            tensors = [layer.k_cache, layer.v_cache, *layer.scales.values()]
            if spec.value_in_key and self.groups[group].values_in_keys:
                del tensors[1]  # a view of the keys
            parts += [as_bytes(tensor) for tensor in tensors if tensor is not None]
        return parts

    def read(
        self, spec: LayerSpec, block_tables: list[list[int]], length: int, most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [n, Hkv, Dk] and values [n, Hkv, Dv] of a sequence's last n = min(length, most) tokens, as copies.

        In the cache's dtype, or float32 if it is quantized. Zeros where the layer gave back what no later query sees.
        """
        layer = self.layers[spec.layer_idx, spec.call]
        if not length:
            dtype = torch.float32 if layer.scales["k_scale"] is not None else self.dtype
            return tuple(
                torch.empty(0, spec.num_kv_heads, size, dtype=dtype, device=self.device)
                for size in (spec.head_dim, spec.value_dim)
            )
        table = torch.tensor(block_tables[layer.group], dtype=torch.int64, device=self.device)
        first = max(0, length - most)
        key, value = ops.gather_kv(layer.k_cache, layer.v_cache, table.clamp(min=0), length, **layer.scales)
        gone = (table < 0).repeat_interleave(self.block_size)[:length, None, None]
        return key.masked_fill(gone, 0)[first:], value.masked_fill(gone, 0)[first:]

    def write(
        self, spec: LayerSpec, block_tables: list[list[int]], length: int, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store key [n, Hkv, Dk] and value [n, Hkv, Dv] as the last n of a sequence's first `length` tokens."""
        layer = self.layers[spec.layer_idx, spec.call]
        table = torch.tensor(block_tables[layer.group], dtype=torch.int64, device=self.device)
        positions = torch.arange(length - len(key), length, device=self.device)
        slots = table[positions // self.block_size] * self.block_size + positions % self.block_size
        ops.store_kv(key, value, layer.k_cache, layer.v_cache, slots, **layer.scales, backend=self.backend)

    def close(self) -> None:
        for layer in self.layers.values():
            layer.k_cache = layer.v_cache = None
            layer.scales = dict(k_scale=None, v_scale=None)
        self.generation += 1
        self.num_blocks = [0] * len(self.groups)
        self.states.close()
        if self.host is not None:
            self.host.close()
        self._give_back()

    def _give_back(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # back to the device, not only to torch


def _pairs(moved: dict[int, int], device: torch.device) -> torch.Tensor | None:
    return torch.tensor(list(moved.items()), device=device) if moved else None
