"""States of sequences in layers that keep no keys and values: state spaces, linear attention, convolutions.

Such a layer carries a few tensors of fixed size from token to token. They live in slots, one per sequence, that the
scheduler hands out (core.tables). A step splits the packed rows by sequence and lets the layer's own code advance each
one's state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..base.errors import UnsupportedModel
from ..core.plan import StepPlan
from .transfer import as_bytes

Output = torch.Tensor | tuple[torch.Tensor, ...]  # of a layer: [.., n, ...] each, n being tokens
Select = Callable[[torch.Tensor], torch.Tensor]  # packed rows [1, T, ...] -> those of S sequences with n tokens [S, n, ...]
# (what selects the sequences, their states or None at the start) -> (the layer's output for them, their new states)
Advance = Callable[[Select, "list[torch.Tensor] | None"], tuple[Output, list[torch.Tensor]]]


@dataclass(frozen=True)
class StateSpec:
    """One layer that keeps a state, as seen when the model ran.

    Attributes:
        layer_idx: the number the model gives its layer.
        name: the layer's path in the model.
        kind: what the layer is, for people.
        tensors: (shape, dtype) of every tensor of one sequence's state.
        takes_chunks: whether it goes on from a state by several tokens at once, with the same result as one by one. If
            not, a prompt is computed in one step (Scheduler.whole_prompts), and what follows it token by token.
    """

    layer_idx: int
    name: str
    kind: str
    tensors: tuple[tuple[torch.Size, torch.dtype], ...]
    takes_chunks: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of one sequence's state."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.tensors)


class StateCache:
    """The state tensors [slots, ...] of every layer, growing on demand."""

    def __init__(self, specs: list[StateSpec], device: torch.device):
        self.specs = {spec.name: spec for spec in specs}
        self.device = device
        self.num_slots = 0
        self._tensors: dict[str, list[torch.Tensor]] = {}

    @property
    def bytes_per_slot(self) -> int:
        return sum(spec.num_bytes for spec in self.specs.values())

    @property
    def bytes_allocated(self) -> int:
        return self.num_slots * self.bytes_per_slot

    def ensure(self, num_slots: int) -> None:
        """Grow to at least `num_slots` slots; contents are kept."""
        if num_slots > self.num_slots:
            self._allocate(num_slots)

    def _allocate(self, num_slots: int) -> None:
        for name, spec in self.specs.items():  # layer by layer, so little is held twice
            new = [torch.zeros((num_slots, *shape), dtype=dtype, device=self.device) for shape, dtype in spec.tensors]
            for old, tensor in zip(self._tensors.get(name, []), new):
                tensor[: self.num_slots].copy_(old[: self.num_slots])
            self._tensors[name] = new
        self.num_slots = num_slots

    def read(self, name: str, slots: torch.Tensor) -> list[torch.Tensor]:
        """Copies of a layer's states in `slots` [S]."""
        return [tensor.index_select(0, slots) for tensor in self._tensors[name]]

    def write(self, name: str, slots: torch.Tensor, states: list[torch.Tensor]) -> None:
        for tensor, state in zip(self._tensors[name], states, strict=True):
            tensor.index_copy_(0, slots, state.to(tensor.dtype))

    def parts(self) -> list[torch.Tensor]:
        """Every state tensor as uint8 [slots, n] in the same memory."""
        return [as_bytes(tensor) for tensors in self._tensors.values() for tensor in tensors]

    def close(self) -> None:
        self._tensors.clear()
        self.num_slots = 0


@dataclass(frozen=True)
class _Group:
    """Sequences of a step that a layer advances together: equally many new tokens, all at their start or none.

    Attributes:
        rows: [S * n] packed rows, sequence by sequence.
        shape: (S, n).
        reads: [S] slots to read; None at the start.
        writes: [S] slots to write.
    """

    rows: torch.Tensor
    shape: tuple[int, int]
    reads: torch.Tensor | None
    writes: torch.Tensor

    def select(self, packed: torch.Tensor, token: int | None = None) -> torch.Tensor:
        """The group's rows [S, n, ...] of `packed` [1, T, ...], or of one token [S, 1, ...]."""
        rows = packed[0, self.rows].unflatten(0, self.shape)
        return rows if token is None else rows[:, token : token + 1]

    def advance(self, advance: Advance, state: list[torch.Tensor] | None, takes_chunks: bool):
        if takes_chunks or state is None or self.shape[1] == 1:
            return advance(self.select, state)
        outputs = []
        for token in range(self.shape[1]):
            output, state = advance(partial(self.select, token=token), state)
            outputs.append(output)
        return _each(lambda *tokens: torch.cat(tokens, dim=1), *outputs), state


@dataclass(frozen=True)
class StateGroup:
    """`_Group` as the host knows it.

    Attributes:
        count: new tokens of each sequence.
        fresh: whether they are at their start.
        entries: (first packed row, slot to read, slot to write) of each.
    """

    count: int
    fresh: bool
    entries: list[tuple[int, int, int]]


def state_groups(plan: StepPlan) -> list[StateGroup]:
    """The sequences of a step by what their layers with a state can advance together; none if there are no such layers."""
    members: dict[tuple[int, bool], list[tuple[int, int, int]]] = {}
    start = 0
    for count, (read, write) in zip(plan.num_new, plan.states):
        members.setdefault((count, read < 0), []).append((start, read, write))
        start += count
    return [StateGroup(count, fresh, entries) for (count, fresh), entries in members.items()]


class StepStates:
    """One step's sequences, as the layers with a state see them.

    Args:
        groups: every group, and int64 [S, 3] of its entries on the device.
        num_tokens: of the packed batch.

    Attributes:
        running: the layer whose own code is running, which sees no packed batch; None outside.
    """

    def __init__(self, groups: list[tuple[StateGroup, torch.Tensor]], num_tokens: int, cache: StateCache):
        self.running: str | None = None
        self._cache = cache
        self._done: set[str] = set()
        self._num_tokens = num_tokens
        self._groups = [self._group(group, entries) for group, entries in groups]

    def _group(self, group: StateGroup, entries: torch.Tensor) -> _Group:
        starts, reads, writes = entries.unbind(1)
        rows = starts[:, None] + torch.arange(group.count, device=self._cache.device)
        return _Group(rows.flatten(), (len(entries), group.count), None if group.fresh else reads, writes)

    def advance(self, name: str, advance: Advance) -> Output:
        """Run a layer: every sequence goes on from its own state, and leaves it. Returns the packed output [1, T, ...]."""
        if name in self._done:
            raise UnsupportedModel(f"{name} ran twice in one step; its state can go on only once")
        self._done.add(name)
        self.running = name
        try:
            return self._advance(name, advance)
        finally:
            self.running = None

    def _advance(self, name: str, advance: Advance) -> Output:
        cache, takes_chunks = self._cache, self._cache.specs[name].takes_chunks
        # all reads come before any write: a slot may be read by one sequence and written by another
        states = [None if group.reads is None else cache.read(name, group.reads) for group in self._groups]
        outputs = []
        for group, state in zip(self._groups, states):
            output, state = group.advance(advance, state, takes_chunks)
            cache.write(name, group.writes, state)
            outputs.append(output)
        return _each(self._pack, *outputs)

    def _pack(self, *parts: torch.Tensor) -> torch.Tensor:
        """[S, n, ...] of every group -> [1, T, ...]."""
        if len(parts) == 1:  # its rows are all rows, in order
            return parts[0].flatten(0, 1)[None]
        result = parts[0].new_empty(1, self._num_tokens, *parts[0].shape[2:])
        for group, part in zip(self._groups, parts):
            result[0, group.rows] = part.flatten(0, 1)
        return result


def _each(function: Callable[..., torch.Tensor], *outputs: Output) -> Output:
    """`function` of the outputs, or of every one of their parts."""
    if isinstance(outputs[0], torch.Tensor):
        return function(*outputs)
    return tuple(map(function, *outputs))
