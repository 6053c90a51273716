"""Whether a step's attention reads prefixes that several of its decodes share once for all of them, and which."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from hf_paged_kernels import ops
from hf_paged_kernels.cpu.attention import SHARED_UNIT
from hf_paged_kernels.metadata import SharedPrefixes

from ..core.plan import StepPlan
from ..core.shared_prefix import SharedPrefix, find_shared_prefixes
from .layout import BlockGroup

_ALIGNED = 4  # int32 entries: Triton compiles a kernel anew for a pointer that is no multiple of 16 bytes


@dataclass(frozen=True)
class Reading:
    """How the kernels of a backend read what is shared.

    Attributes:
        rows: query rows of a KV head that one reading serves.
        unit: tokens that are shared at a time.
        windows: whether layers with a window or chunks take part, in steps in which nobody's has moved yet.
        min_saved_bytes: of a layer's keys and values that need not be read, if grouping is to pay.
    """

    rows: int
    unit: int
    windows: bool
    min_saved_bytes: int


READINGS = {
    # What memory at 3 TB/s moves in 5 microseconds, the time of two more launches. An estimate: to be measured.
    "triton": Reading(rows=64, unit=1, windows=False, min_saved_bytes=16 << 20),
    # Measured on one core of an EPYC: a byte saved is worth 6 picoseconds (fp32, bf16, int8) and more, finding what 32
    # sequences share costs some 10 microseconds a layer.
    "cpu": Reading(rows=48, unit=SHARED_UNIT, windows=True, min_saved_bytes=2 << 20),
}


class PrefixSharing:
    """Tells the attention of a step what its decodes share, where that saves more than it costs.

    Over a shared prefix of P tokens, n sequences read P keys and values once per reading instead of n times. The price
    is two more launches a layer with Triton, and on the CPU the time to find the prefix. So the rule is tokens saved *
    bytes of a token >= `min_saved_bytes` in a layer.

    Attributes:
        saved_tokens: tokens of keys and values that a layer did not have to read, over all steps.
    """

    def __init__(
        self, groups: list[BlockGroup], *, backend: str, block_size: int, dtype: torch.dtype, device: torch.device
    ):
        self.saved_tokens = 0
        self._groups = groups
        self._reading = READINGS[backend]
        self._block_size = block_size
        self._unit = self._reading.unit // math.gcd(self._reading.unit, block_size)  # blocks
        self._dtype = dtype
        self._device = device

    def announce(self, plan: StepPlan, metadata: list[ops.AttentionMetadata]) -> None:
        """Set `shared` of the metadata of each block group where it pays. The batch must not be padded."""
        saved_tokens = []
        for group, tables, meta in zip(self._groups, plan.block_tables, metadata):
            contexts = plan.num_context[: meta.num_decodes]
            if len(contexts) < 2 or not self._takes_part(group, max(contexts)):
                continue
            rows = max(layer.num_heads // layer.num_kv_heads for layer in group.layers)  # of a sequence and KV head
            token_bytes = min(layer.bytes_per_token(self._dtype) for layer in group.layers)
            if (sum(contexts) - max(contexts)) * token_bytes < self._reading.min_saved_bytes:
                continue  # not even if they shared all they can
            per_reading = max(1, self._reading.rows // rows)
            full_blocks = [context // self._block_size for context in contexts]
            found = find_shared_prefixes(tables[: len(contexts)], full_blocks, per_reading, self._unit)
            saved = self._block_size * sum(prefix.saved_blocks(per_reading) for prefix in found)
            if saved * token_bytes >= self._reading.min_saved_bytes:
                meta.shared = shared_prefixes(found, contexts, self._block_size, self._device)
                saved_tokens.append(saved)
        self.saved_tokens += max(saved_tokens, default=0)

    def _takes_part(self, group: BlockGroup, longest: int) -> bool:
        """Whether the layers of a group read what is shared once, the longest sequence having so many tokens before this step."""
        if group.values_in_keys and any(layer.value_in_key for layer in group.layers):
            return False
        sees = group.window or group.chunk
        return sees is None or self._reading.windows and longest < sees


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
