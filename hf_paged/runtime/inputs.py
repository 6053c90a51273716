"""A StepPlan's numbers on the device: token ids, positions, block tables, and where each token is written.

On CPU they are made with numpy. Elsewhere the host packs everything it knows into one pinned buffer, which one
asynchronous copy and one kernel turn into the tensors of the step; they lie in buffers that never move, as CUDA graphs
need them, and the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hf_paged_kernels import ops
from hf_paged_kernels.inputs import InputBuffers, PackedSizes, prepare_inputs

from ..core.plan import StepPlan
from .states import StateGroup, state_groups
from .transfer import to_device

_MIN_PACKED = 1 << 14  # entries of a staging buffer to begin with
_MAX_FIRST_WIDTH = 4096  # blocks a table row has room for to begin with, whatever the model's length


@dataclass(slots=True)
class StepInputs:
    """What a step's batch consists of, on the device.

    Attributes:
        input_ids: int64 [1, T].
        positions: int64 [T].
        rows: int64 [R], packed rows whose logits are wanted.
        metadata: one per block group.
        copies: per block group the blocks to copy first, int64 [n, 2] of (source, destination); None if there are none.
        states: what `states.StepStates` is made of: groups of sequences, and for each int64 [S, 3] of (first packed row,
            slot to read, slot to write).
        rope_positions: int64 [P, T], the positions that the model is told where images have moved them; None: `positions`.
    """

    input_ids: Tensor
    positions: Tensor
    rows: Tensor
    metadata: list[ops.AttentionMetadata]
    copies: list[Tensor | None]
    states: list[tuple[StateGroup, Tensor]]
    rope_positions: Tensor | None = None


class Inputs(Protocol):
    """Makes the StepInputs of one cache. They are valid until the next ones are made."""

    def prepare(
        self,
        plan: StepPlan,
        rows: Sequence[int],
        sampled: Tensor | None,
        padded: int | None = None,
        shifts: np.ndarray | None = None,
    ) -> StepInputs:
        """The inputs of `plan`.

        Args:
            rows: packed rows whose logits are wanted.
            sampled: int64, on the device: what token ids below 0 stand for, -1 - i for entry i. Without it they stay.
            padded: add sequences of one token that is read and written nowhere, up to so many; all others have one too.
            shifts: see `media.position_shifts`; of one plane if the step is padded.
        """
        ...


def make_inputs(
    num_groups: int,
    *,
    block_size: int,
    device: torch.device,
    backend: str,
    max_batch_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    shifts_positions: bool = False,
) -> Inputs:
    """The way that suits a device and its attention kernels.

    Args:
        max_batch_tokens, max_num_seqs, max_model_len: what most steps stay within.
        shifts_positions: there may be `shifts`.
    """
    backend = ops.resolve_backend(backend, device)
    if device.type == "cpu" and backend != "triton":
        return HostInputs(block_size, device)
    width = min(-(-max_model_len // block_size), _MAX_FIRST_WIDTH)
    return StagedInputs(
        num_groups,
        block_size=block_size,
        device=device,
        backend=backend,
        num_tokens=max(max_batch_tokens, max_num_seqs),
        num_seqs=max_num_seqs,
        width=width,
        shifts_positions=shifts_positions,
    )


class HostInputs:
    """Inputs made with numpy, new tensors every step."""

    def __init__(self, block_size: int, device: torch.device):
        self._block_size = block_size
        self._device = device

    def prepare(
        self,
        plan: StepPlan,
        rows: Sequence[int],
        sampled: Tensor | None,
        padded: int | None = None,
        shifts: np.ndarray | None = None,
    ) -> StepInputs:
        assert padded is None, "padding is for CUDA graphs"
        num_new = np.asarray(plan.num_new, dtype=np.int64)
        context = np.asarray(plan.num_context, dtype=np.int64)
        cu_seqlens = _cumulated(num_new)
        sequence = np.repeat(np.arange(len(num_new)), num_new)
        positions = np.arange(cu_seqlens[-1]) - cu_seqlens[sequence] + context[sequence]
        seq_lens = (context + num_new).astype(np.int32)
        input_ids = self._tensor(plan.token_ids)
        if sampled is not None:
            input_ids = torch.where(input_ids < 0, sampled[(-1 - input_ids).clamp(min=0)], input_ids)
        shared = dict(
            cu_seqlens_q=self._tensor(cu_seqlens, torch.int32),
            seq_lens=self._tensor(seq_lens, torch.int32),
            max_seqlen_q=int(num_new.max()),
            max_seqlen_k=int(seq_lens.max()),
            num_decodes=_num_decodes(plan),
            ends=_ends(plan, self._device),
        )
        return StepInputs(
            input_ids=input_ids[None],
            positions=self._tensor(positions),
            rows=self._tensor(rows),
            metadata=[
                ops.AttentionMetadata(**shared, **self._group_tables(tables, sequence, positions))
                for tables in plan.block_tables
            ],
            copies=[self._tensor(pairs) if pairs else None for pairs in plan.copies],
            states=[(group, self._tensor(group.entries)) for group in state_groups(plan)],
            rope_positions=None if shifts is None else self._tensor(positions + shifts),
        )

    def _tensor(self, values, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self._device)

    def _group_tables(self, tables: list[list[int]], sequence: np.ndarray, positions: np.ndarray) -> dict:
        block_table = np.full((len(tables), max(map(len, tables))), -1, dtype=np.int32)
        for row, table in zip(block_table, tables):
            row[: len(table)] = table
        blocks = block_table[sequence, positions // self._block_size].astype(np.int64)
        slots = blocks * self._block_size + positions % self._block_size
        return dict(block_table=self._tensor(block_table, torch.int32), slot_mapping=self._tensor(slots))


class StagedInputs:
    """Inputs expanded on the device into buffers that do not move.

    Attributes:
        generation: counts how often the buffers were replaced by larger ones; tensors made before lie in the old ones.
    """

    def __init__(
        self, num_groups: int, *, block_size: int, device: torch.device, backend: str, num_tokens: int, num_seqs: int,
        width: int, shifts_positions: bool = False,
    ):  # fmt: skip
        self.generation = 0
        self._num_groups = num_groups
        self._block_size = block_size
        self._device = device
        self._backend = backend
        self._staging = _Staging(device)
        self._room = (num_tokens, num_seqs, num_tokens, width)  # tokens, sequences, rows, blocks a table
        self._buffers: InputBuffers | None = None
        self._shifts_positions = shifts_positions
        self._rope_positions: Tensor | None = None  # [tokens], of padded steps

    def prepare(
        self,
        plan: StepPlan,
        rows: Sequence[int],
        sampled: Tensor | None,
        padded: int | None = None,
        shifts: np.ndarray | None = None,
    ) -> StepInputs:
        sizes, parts, longest = _pack(plan, rows)
        groups = state_groups(plan)
        copies = [np.asarray(pairs, dtype=np.int32).reshape(-1) for pairs in plan.copies]
        states = [np.asarray(group.entries, dtype=np.int32).reshape(-1) for group in groups]
        sent = self._staging.send([*parts, *copies, *states])
        self._ensure(sizes, padded)
        prepare_inputs(
            sent,
            sizes,
            self._buffers,
            block_size=self._block_size,
            padded_seqs=padded,
            sampled=sampled,
            backend=self._backend,
        )
        if padded is None:
            counts = sizes.num_seqs, sizes.num_tokens, sizes.num_rows
            inputs = self._views(*counts, sizes.longest_new, longest, _num_decodes(plan))
        else:
            inputs = self.static(padded)
        if self._shifts_positions:
            inputs.rope_positions = self._moved(inputs.positions, shifts, padded is not None)
        ends = _ends(plan, self._device)
        for metadata in inputs.metadata if ends is not None else ():
            metadata.ends = ends
        extras = iter(sent[sum(map(len, parts)) :].split([len(extra) for extra in (*copies, *states)]))
        inputs.copies = [pairs.view(-1, 2).long() if len(pairs) else None for _, pairs in zip(copies, extras)]
        inputs.states = [(group, entries.view(-1, 3).long()) for group, entries in zip(groups, extras)]
        return inputs

    def static(self, num_seqs: int) -> StepInputs:
        """The buffers as inputs of `num_seqs` single tokens, whatever they hold now and will hold later.

        Lengths are bounds: no number of this step is in it.
        """
        width = self._buffers.block_table.shape[2]
        inputs = self._views(num_seqs, num_seqs, num_seqs, 1, width * self._block_size, num_seqs)
        if self._shifts_positions:
            inputs.rope_positions = self._rope_positions[None, :num_seqs]
        return inputs

    def _moved(self, positions: Tensor, shifts: np.ndarray | None, padded: bool) -> Tensor | None:
        """[P, T] positions with their shifts; those of a padded step in the buffer that does not move."""
        moved = None if shifts is None else positions[: shifts.shape[1]] + to_device(shifts, torch.int64, self._device)
        if not padded:
            return moved
        target = self._rope_positions[: len(positions)]
        target.copy_(positions)
        if moved is not None:
            target[: moved.shape[1]].copy_(moved[0])
        return target[None]

    def _views(
        self, num_seqs: int, num_tokens: int, num_rows: int, longest_new: int, longest: int, num_decodes: int
    ) -> StepInputs:
        out = self._buffers
        shared = dict(
            cu_seqlens_q=out.cu_seqlens[: num_seqs + 1],
            seq_lens=out.seq_lens[:num_seqs],
            max_seqlen_q=longest_new,
            max_seqlen_k=longest,
            num_decodes=num_decodes,
        )
        return StepInputs(
            input_ids=out.input_ids[:num_tokens][None],
            positions=out.positions[:num_tokens],
            rows=out.rows[:num_rows],
            metadata=[
                ops.AttentionMetadata(**shared, block_table=table[:num_seqs], slot_mapping=slots[:num_tokens])
                for table, slots in zip(out.block_table, out.slot_mapping)
            ],
            copies=[None] * self._num_groups,
            states=[],
        )

    def _ensure(self, sizes: PackedSizes, padded: int | None) -> None:
        """Buffers with room for a step; larger ones than usual if need be, which then stay."""
        need = (sizes.num_tokens, sizes.num_seqs, sizes.num_rows, sizes.longest_table)
        need = tuple(max(count, padded or 0) for count in need[:3]) + need[3:]
        if self._buffers is not None and all(have >= count for have, count in zip(self._room, need)):
            return
        self._room = tuple(have if have >= count else max(count, 2 * have) for have, count in zip(self._room, need))
        num_tokens, num_seqs, num_rows, width = self._room
        new = lambda *shape, dtype=torch.int64: torch.zeros(shape, dtype=dtype, device=self._device)  # noqa: E731
        self._buffers = InputBuffers(
            input_ids=new(num_tokens),
            positions=new(num_tokens),
            rows=new(num_rows),
            cu_seqlens=new(num_seqs + 1, dtype=torch.int32),
            seq_lens=new(num_seqs, dtype=torch.int32),
            block_table=new(self._num_groups, num_seqs, width, dtype=torch.int32),
            slot_mapping=new(self._num_groups, num_tokens),
        )
        if self._shifts_positions:
            self._rope_positions = new(num_tokens)
        self.generation += 1


class _Staging:
    """The way to the device: two pinned buffers in turn, so that the copy under way is never written over."""

    def __init__(self, device: torch.device):
        self._device = device
        self._cuda = device.type == "cuda"
        self._hosts = [torch.empty(0, dtype=torch.int32)] * 2
        self._copied = [torch.cuda.Event() if self._cuda else None for _ in range(2)]
        self._target = torch.empty(0, dtype=torch.int32, device=device)
        self._turn = 0

    def send(self, parts: list[np.ndarray]) -> Tensor:
        """The int32 vectors `parts`, one after another, on the device; valid until the next call on this stream."""
        size = sum(map(len, parts))
        turn = self._turn = 1 - self._turn
        if self._cuda:
            self._copied[turn].synchronize()  # of the step before the last, long done
        if len(self._hosts[turn]) < size:
            self._hosts[turn] = torch.empty(self._capacity(size), dtype=torch.int32, pin_memory=self._cuda)
        if len(self._target) < size:
            self._target = torch.empty(self._capacity(size), dtype=torch.int32, device=self._device)
        host, target = self._hosts[turn][:size], self._target[:size]
        np.concatenate(parts, out=host.numpy())
        target.copy_(host, non_blocking=True)
        if self._cuda:
            self._copied[turn].record()
        return target

    @staticmethod
    def _capacity(size: int) -> int:
        return max(_MIN_PACKED, 1 << (size - 1).bit_length())


def _pack(plan: StepPlan, rows: Sequence[int]) -> tuple[PackedSizes, list[np.ndarray], int]:
    """(sizes, the sections of the packed buffer in order, tokens of the longest sequence after the step)."""
    num_new, context = np.asarray(plan.num_new, dtype=np.int32), np.asarray(plan.num_context, dtype=np.int32)
    num_seqs, num_groups = len(num_new), len(plan.block_tables)
    lengths = np.fromiter(map(len, chain.from_iterable(plan.block_tables)), np.int32, num_groups * num_seqs)
    starts = np.zeros((num_groups, num_seqs + 1), dtype=np.int32)
    ends = lengths.cumsum(dtype=np.int32).reshape(num_groups, num_seqs)
    starts[:, 1:] = ends
    starts[1:, 0] = ends[:-1, -1]
    entries = chain.from_iterable(chain.from_iterable(plan.block_tables))
    sections = [
        _cumulated(num_new),
        context,
        starts.reshape(-1),
        np.asarray(plan.token_ids, dtype=np.int32),
        np.asarray(rows, dtype=np.int32),
        np.fromiter(entries, np.int32, int(lengths.sum())),
    ]
    sizes = PackedSizes(
        num_seqs=num_seqs,
        num_tokens=plan.num_tokens,
        num_rows=len(rows),
        num_groups=num_groups,
        longest_new=int(num_new.max()),
        longest_table=int(lengths.max(initial=0)),
    )
    return sizes, sections, int((context + num_new).max())


def _ends(plan: StepPlan, device: torch.device) -> Tensor | None:
    """`AttentionMetadata.ends`: images of the step whose tokens see each other. None: there are none."""
    if not any(rows.seen for rows in plan.media):
        return None
    ends = [0] * plan.num_tokens
    for rows in plan.media:
        ends[rows.row : rows.row + rows.count] = [rows.seen] * rows.count
    return to_device(ends, torch.int32, device)


def _num_decodes(plan: StepPlan) -> int:
    """How many sequences have one new token: they come first."""
    return next((i for i, count in enumerate(plan.num_new) if count != 1), len(plan.num_new))


def _cumulated(counts: np.ndarray) -> np.ndarray:
    """int32 [n + 1], from 0 to the sum."""
    result = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=result[1:])
    return result
