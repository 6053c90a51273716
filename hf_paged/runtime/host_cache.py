"""Host memory behind a KV cache: whole blocks over all their layers, and states, as rows of bytes.

A step first sends out what gives its place up, then brings in what it needs (core.plan.TierMoves). On CUDA rows move on a
stream of their own, through two buffers on the device that take turns:

    leaving     step's stream: gather blocks into a buffer  ->  own stream: buffer to pinned rows
    coming      own stream: pinned rows to a buffer         ->  step's stream: scatter the buffer into blocks

So the step's stream never waits for what leaves, and what comes may be on its way while the step before still runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ..core.plan import TierMoves
from .disk_cache import DiskCache
from .kv_cache import KVCache
from .transfer import to_device

_SEGMENT_BYTES = 64 << 20  # of host memory, taken at a time
_BUFFER_BYTES = 16 << 20  # on the device, twice; more if a row is larger
_PROBES = 32  # rows copied at once to learn what a byte takes

Rows = Callable[[torch.Tensor], None]  # does something with a buffer, uint8 [rows, n]


class CopyTime(NamedTuple):
    """Seconds that copying takes: `overhead`, however little it is, and so many per byte."""

    overhead: float
    per_byte: float


class HostCache:
    """The rows of host memory of one KV cache, taken as they are needed.

    Args:
        cache: whose blocks and states move. Its tensors may be replaced between two calls.
        max_slots: per group, most blocks there will be.
        max_states: most states there will be.

    Attributes:
        bytes_out, bytes_back: copied so far.
        disk: where blocks go that give their rows up; None: nowhere.
    """

    def __init__(self, cache: KVCache, max_slots: Sequence[int], max_states: int):
        self._transfer = _Transfer(cache.device)
        parts = [*(partial(cache.parts, group) for group in range(len(cache.groups))), cache.states.parts]
        sizes = [*max_slots, max_states]
        self._shelves = [_Shelf(of, most, self._transfer) for of, most in zip(parts, sizes, strict=True)]
        self.bytes_out = self.bytes_back = 0
        self.disk: DiskCache | None = None

    @property
    def bytes_allocated(self) -> int:
        """Host memory taken so far."""
        return sum(shelf.bytes_allocated for shelf in self._shelves)

    def move(self, moves: TierMoves) -> None:
        """Everything that moves with a step, before anything else of it is done; the cache's tensors are large enough."""
        for shelf, num_rows in zip(self._shelves, [*moves.num_slots, moves.num_states], strict=True):
            shelf.ensure(num_rows)
        if moves.spilled or moves.read:
            self._transfer.synchronize()  # no row is on its way, there or back
        for group, slot, key in moves.spilled:
            self.disk.write(group, key, self._shelves[group].row(slot))
        for group, slot, contents in moves.read:
            self._shelves[group].row(slot).copy_(contents)
        for shelf, out in zip(self._shelves, [*moves.out, moves.states_out], strict=True):
            shelf.take(out)
            self.bytes_out += len(out) * shelf.row_bytes
        for shelf, back in zip(self._shelves, [*moves.back, moves.states_back], strict=True):
            shelf.give(back)
            self.bytes_back += len(back) * shelf.row_bytes

    def measure(self) -> CopyTime:
        """What copying takes, measured on the way to the host from the first place of the cache, which exists."""
        shelf = max((shelf for shelf in self._shelves if shelf.num_places), key=lambda shelf: shelf.row_bytes)
        shelf.ensure(1)
        one = self._seconds(shelf, 1)
        per_byte = max(self._seconds(shelf, _PROBES) - one, 0) / ((_PROBES - 1) * shelf.row_bytes)
        shelf.close()
        return CopyTime(max(one - per_byte * shelf.row_bytes, 0.0), max(per_byte, 1e-15))

    def _seconds(self, shelf: _Shelf, count: int) -> float:
        """To copy `count` places, at best."""
        taken = []
        for _ in range(4):  # the first takes the memory, too
            started = time.perf_counter()
            shelf.take([(0, place % shelf.num_rows) for place in range(count)])
            self._transfer.synchronize()
            taken.append(time.perf_counter() - started)
        return min(taken)

    def row_bytes(self, group: int) -> int:
        """Of a block of a group; the cache has one at least."""
        return self._shelves[group].row_bytes

    def store(self, rows: Iterable[tuple[int, int, bytes]], blocks: Iterable[tuple[int, int, bytes]]) -> None:
        """Write rows (group, slot, key) to the disk now, and blocks (group, block, key) of the device."""
        self._transfer.synchronize()
        for group, slot, key in rows:
            self.disk.write(group, key, self._shelves[group].row(slot), waits=True)
        for group, block, key in blocks:
            self.disk.write(group, key, self._shelves[group].place(block), waits=True)

    def close(self) -> None:
        """Give all memory back, and forget what was in it."""
        self._transfer.close()
        for shelf in self._shelves:
            shelf.close()


class _Shelf:
    """Rows of host memory, each as large as one place over all of some tensors.

    Args:
        parts: gives the tensors as they are now, each as uint8 [places, n].
        max_rows: most rows there will be.
    """

    def __init__(self, parts: Callable[[], list[torch.Tensor]], max_rows: int, transfer: _Transfer):
        self._parts = parts
        self._max_rows = max_rows
        self._transfer = transfer
        self._segments: list[torch.Tensor] = []

    @property
    def num_places(self) -> int:
        """That the tensors have now."""
        return min(map(len, self._parts()), default=0)

    @property
    def row_bytes(self) -> int:
        return sum(part.shape[1] for part in self._parts())

    @property
    def bytes_allocated(self) -> int:
        return sum(segment.nbytes for segment in self._segments)

    @property
    def num_rows(self) -> int:
        """That there is memory for now."""
        return sum(map(len, self._segments))

    def ensure(self, num_rows: int) -> None:
        """Take host memory for so many rows at least: segment by segment, of equal sizes but for the last."""
        while (have := self.num_rows) < num_rows:
            row_bytes = self.row_bytes
            count = min(max(1, _SEGMENT_BYTES // row_bytes), self._max_rows - have)
            # pinned: the host need not wait for what goes there, or comes from there
            pinned = self._transfer.on_cuda
            self._segments.append(torch.empty((count, row_bytes), dtype=torch.uint8, pin_memory=pinned))

    def row(self, index: int) -> torch.Tensor:
        """uint8 [row_bytes]."""
        per_segment = len(self._segments[0])
        return self._segments[index // per_segment][index % per_segment]

    def place(self, index: int) -> torch.Tensor:
        """What a row of a place would be, in host memory: uint8 [row_bytes]."""
        return torch.cat([part[index] for part in self._parts()]).cpu()

    def take(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy places of the tensors to rows; `pairs` of (place, row)."""
        for places, rows in self._chunks(pairs):

            def gather(buffer: torch.Tensor) -> None:
                for part, columns in self._columns(buffer):
                    columns.copy_(part.index_select(0, places))

            def send(buffer: torch.Tensor) -> None:
                for row, filled in zip(rows, buffer, strict=True):
                    self.row(row).copy_(filled, non_blocking=True)

            self._transfer.leave(len(rows), self.row_bytes, gather, send)

    def give(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy rows to places of the tensors; `pairs` of (row, place)."""
        for places, rows in self._chunks([(place, row) for row, place in pairs]):

            def fetch(buffer: torch.Tensor) -> None:
                for row, filled in zip(rows, buffer, strict=True):
                    filled.copy_(self.row(row), non_blocking=True)

            def scatter(buffer: torch.Tensor) -> None:
                for part, columns in self._columns(buffer):
                    part.index_copy_(0, places, columns)

            self._transfer.come(len(rows), self.row_bytes, fetch, scatter)

    def _chunks(self, pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """(places on the device, rows) of as many pairs as a buffer takes."""
        count = max(1, _BUFFER_BYTES // self.row_bytes) if pairs else 1
        for start in range(0, len(pairs), count):
            places, rows = zip(*pairs[start : start + count], strict=True)
            yield to_device(places, torch.int64, self._transfer.device), list(rows)

    def _columns(self, buffer: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every part, and the columns of `buffer` that are its: in words of 8 bytes, where all are made of them."""
        parts = self._parts()
        word = torch.int64 if all(part.shape[1] % 8 == 0 for part in parts) else torch.uint8
        start = 0
        for part in parts:
            end = start + part.shape[1]
            yield part.view(word), buffer[:, start:end].view(word)
            start = end

    def close(self) -> None:
        self._segments.clear()


class _Buffer:
    """Room for some rows on the device.

    Attributes:
        free: passed when whoever used it last is done with it; None: nobody has, and its memory may still be in use for what
            was there before it.
    """

    __slots__ = ("_bytes", "free")

    def __init__(self):
        self._bytes: torch.Tensor | None = None
        self.free: torch.cuda.Event | None = None

    def rows(self, count: int, row_bytes: int, device: torch.device) -> torch.Tensor:
        if self._bytes is None or len(self._bytes) < row_bytes:
            if self.free is not None:
                self.free.synchronize()  # torch does not know that it is still in use on another stream
            self._bytes, self.free = torch.empty(max(_BUFFER_BYTES, row_bytes), dtype=torch.uint8, device=device), None
        return self._bytes[: count * row_bytes].view(count, row_bytes)


class _Transfer:
    """The way between device and host: a stream of its own on CUDA, and two buffers that take turns."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_cuda = device.type == "cuda"
        self._own = torch.cuda.Stream(device) if self.on_cuda else None
        self._buffers = [_Buffer(), _Buffer()]

    def leave(self, count: int, row_bytes: int, gather: Rows, send: Rows) -> None:
        """`gather` into a buffer in the order of the step, `send` it to the host when that was done."""
        buffer = self._next()
        rows = buffer.rows(count, row_bytes, self.device)
        if self._own is None:
            gather(rows)
            send(rows)
            return
        step = torch.cuda.current_stream(self.device)
        if buffer.free is not None:
            step.wait_event(buffer.free)
        gather(rows)
        self._own.wait_stream(step)
        with torch.cuda.stream(self._own):
            send(rows)
            buffer.free = self._own.record_event()

    def come(self, count: int, row_bytes: int, fetch: Rows, scatter: Rows) -> None:
        """`fetch` rows from the host into a buffer, `scatter` it in the order of the step when they are there."""
        buffer = self._next()
        rows = buffer.rows(count, row_bytes, self.device)
        if self._own is None:
            fetch(rows)
            scatter(rows)
            return
        step = torch.cuda.current_stream(self.device)
        if buffer.free is None:
            self._own.wait_stream(step)
        else:
            self._own.wait_event(buffer.free)
        with torch.cuda.stream(self._own):
            fetch(rows)
        step.wait_stream(self._own)
        scatter(rows)
        buffer.free = step.record_event()

    def _next(self) -> _Buffer:
        self._buffers.reverse()
        return self._buffers[0]

    def synchronize(self) -> None:
        """Wait until everything has arrived."""
        if self._own is not None:
            self._own.synchronize()

    def close(self) -> None:
        """Give the buffers back, when nobody uses them any more."""
        for buffer in self._buffers:
            if buffer.free is not None:
                buffer.free.synchronize()
        self.synchronize()
        self._buffers = [_Buffer(), _Buffer()]
