"""Whether a step's attention reads prefixes that several of its decodes share once for all of them, and which."""

from __future__ import annotations

import numpy as np
import torch

from hf_paged_kernels import ops
from hf_paged_kernels.metadata import SharedPrefixes

from ..core.plan import StepPlan
from ..core.shared_prefix import SharedPrefix, find_shared_prefixes
from .layout import BlockGroup

# Of a layer: what memory at 3 TB/s moves in 5 microseconds, the time of two more launches. An estimate: to be measured.
_MIN_SAVED_BYTES = 16 << 20
_ROWS_PER_READING = 64  # query heads that one reading of a prefix serves: the rows of a program of the kernel
_ALIGNED = 4  # int32 entries: Triton compiles a kernel anew for a pointer that is no multiple of 16 bytes


class PrefixSharing:
    """Tells the attention of a step what its decodes share, where that saves more than it costs.

    Over a shared prefix of P tokens, n sequences read P keys and values once per reading instead of n times; two more
    launches a layer are the price. So the rule is tokens saved * bytes of a token >= _MIN_SAVED_BYTES in a layer.

    Attributes:
        saved_tokens: tokens of keys and values that a layer did not have to read, over all steps.
    """

    def __init__(self, groups: list[BlockGroup], *, block_size: int, dtype: torch.dtype, device: torch.device):
        self.saved_tokens = 0
        self._groups = groups
        self._block_size = block_size
        self._dtype = dtype
        self._device = device

    def announce(self, plan: StepPlan, metadata: list[ops.AttentionMetadata]) -> None:
        """Set `shared` of the metadata of each block group where it pays. The batch must not be padded."""
        saved_tokens = []
        for group, tables, meta in zip(self._groups, plan.block_tables, metadata):
            count = meta.num_decodes
            latents = group.values_in_keys and any(layer.value_in_key for layer in group.layers)
            if count < 2 or group.window is not None or group.chunk is not None or latents:
                continue
            rows = max(layer.num_heads // layer.num_kv_heads for layer in group.layers)  # of a sequence and KV head
            per_reading = max(1, _ROWS_PER_READING // rows)
            full_blocks = [context // self._block_size for context in plan.num_context[:count]]
            found = find_shared_prefixes(tables[:count], full_blocks, per_reading)
            saved = self._block_size * sum(prefix.saved_blocks(per_reading) for prefix in found)
            if saved * min(layer.bytes_per_token(self._dtype) for layer in group.layers) >= _MIN_SAVED_BYTES:
                meta.shared = shared_prefixes(found, plan.num_context[:count], self._block_size, self._device)
                saved_tokens.append(saved)
        self.saved_tokens += max(saved_tokens, default=0)


def shared_prefixes(
    found: list[SharedPrefix], num_context: list[int], block_size: int, device: torch.device
) -> SharedPrefixes:
    """What the kernels are told of `found`, one or more groups of sequences with one new token and so much context."""
    starts = [0] * len(num_context)
    for prefix in found:
        for member in prefix.members:
            starts[member] = prefix.num_blocks * block_size
    groups = [list(prefix.members) for prefix in found]
    prefix_lens = [prefix.num_blocks * block_size for prefix in found]
    if alone := [member for member, start in enumerate(starts) if not start]:
        groups.append(alone)
        prefix_lens.append(0)
    sections = [
        np.concatenate(groups),
        np.cumsum([0, *map(len, groups)]),
        np.asarray(prefix_lens),
        np.asarray(starts),
    ]
    members, group_starts, prefix_lens_, starts_ = _on_device(sections, device)
    return SharedPrefixes(
        members=members,
        group_starts=group_starts,
        prefix_lens=prefix_lens_,
        starts=starts_,
        max_members=max(len(prefix.members) for prefix in found),
        max_prefix=max(prefix_lens),
        max_rest=max(context + 1 - start for context, start in zip(num_context, starts)),
    )


def _on_device(sections: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Each as an int32 vector on the device, by one copy that nobody waits for."""
    sizes = [-(-len(section) // _ALIGNED) * _ALIGNED for section in sections]
    packed = np.zeros(sum(sizes), dtype=np.int32)
    for section, end, size in zip(sections, np.cumsum(sizes), sizes):
        packed[end - size : end - size + len(section)] = section
    host = torch.from_numpy(packed)
    if device.type == "cuda":
        host = host.pin_memory()
    parts = host.to(device, non_blocking=True).split(sizes)
    return [part[: len(section)] for part, section in zip(parts, sections)]
