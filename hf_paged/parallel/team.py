"""The processes that hold the shards of one model: rank 0 says what to do, all do it, sums go around.

    rank 0:   send(STEP, plan) | forward, its sums with the others' | sample
    others:   receive          | forward, its sums with rank 0's    | receive

Orders are int64 vectors, broadcast by gloo whatever the device. Each carries its number and a checksum of the one before
it and its own, so that ranks which no longer agree on what has happened notice at the next order.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist

from ..base.errors import ParallelError
from .heart import Heart, why_lost

CAPACITY = 2048  # entries of an order's first broadcast; what is longer takes a second one
FOREVER = timedelta(days=365)  # an idle server sends nothing; that rank 0 is there at all is for the heart to tell
HEAD = 4  # entries before an order's own: what to do, how many entries, number, checksum


class Order(IntEnum):
    """What rank 0 tells the other ranks to do."""

    OPEN = 1  # make a KV cache
    STEP = 2  # run a plan
    RESIZE = 3  # change the cache's size
    RESERVE = 4  # take its memory
    RELEASE = 5  # give its memory back
    CLOSE = 6  # let go of it
    CALL = 7  # a call begins that all ranks may have made
    RETURN = 8  # it has ended
    STOP = 9  # no more orders


class Team:
    """The ranks of one tensor-parallel group. Every rank makes its own at the same time.

    Args:
        group: the process group that holds the shards.
        device: where activations are.
        timeout: most seconds that one rank waits for another in the middle of something.

    Attributes:
        talking: held by the thread of rank 0 that gives an order, up to the end of what all ranks say to each other at that.
        traffic: what this rank gave to others since it was last cleared, by purpose: bytes, and under "calls ..." calls.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device, self.timeout = device, timeout
        self.traffic: Counter = Counter()
        ranks = dist.get_process_group_ranks(group)
        new = dict(ranks=ranks, backend="gloo", use_local_synchronization=True)
        self._first = ranks[0]
        self._control = dist.new_group(timeout=FOREVER, **new)
        # On CPU a group of our own: one whose sums give up in time. NCCL's cannot, they are aborted from outside.
        self._owns_sums = device.type == "cpu"
        self._sums = dist.new_group(timeout=timedelta(seconds=timeout), **new) if self._owns_sums else group
        self._heart = Heart(dist.new_group(timeout=timedelta(seconds=timeout), **new), self.rank, self.size)
        self._heart.on_failure(self._abort)
        self.talking = threading.RLock()
        self._number, self._checksum = 0, 0
        self._closed = False

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which decides."""
        return self.rank == 0

    # Orders

    def send(self, order: Order, numbers: np.ndarray | None = None) -> None:
        """Tell the other ranks, which `receive` it."""
        numbers = np.empty(0, dtype=np.int64) if numbers is None else numbers
        buffer = np.zeros(CAPACITY, dtype=np.int64)
        first = numbers[: CAPACITY - HEAD]
        buffer[HEAD : HEAD + len(first)] = first
        with self.talking, self.together("orders"):
            self._advance(order, numbers)
            buffer[:HEAD] = order, len(numbers), self._number, self._checksum
            self._broadcast(torch.from_numpy(buffer))
            if len(numbers) > len(first):
                self._broadcast(torch.from_numpy(np.ascontiguousarray(numbers[len(first) :])))

    def receive(self) -> tuple[Order, np.ndarray]:
        """The next order; waits for it as long as rank 0 lives. Raises ParallelError if it is not the one that follows."""
        buffer = np.empty(CAPACITY, dtype=np.int64)
        with self.together("orders"):
            self._broadcast(torch.from_numpy(buffer))
            order, count, number, checksum = buffer[:HEAD].tolist()
            numbers = buffer[HEAD : HEAD + count]
            if count > len(numbers):
                rest = np.empty(count - len(numbers), dtype=np.int64)
                self._broadcast(torch.from_numpy(rest))
                numbers = np.concatenate([numbers, rest])
            self._advance(order, numbers)
            if order == Order.STOP:
                self._heart.expect_leaving()
            if (number, checksum) != (self._number, self._checksum):
                raise ParallelError(
                    f"rank {self.rank} disagrees with rank 0: order {number} has checksum {checksum:#x}, expected number "
                    f"{self._number} with {self._checksum:#x}"
                )
        return Order(order), numbers

    def _advance(self, order: int, numbers: np.ndarray) -> None:
        self._number += 1
        self._checksum = zlib.crc32(numbers.tobytes(), zlib.crc32(bytes([order]), self._checksum))

    def _broadcast(self, tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, self._first, group=self._control)
        self._count("orders", tensor.nbytes)

    def broadcast_object(self, value=None):
        """Rank 0's `value` on all ranks, by torch.distributed's own pickling: for results, among ranks of one user."""
        holder = [value]
        with self.together("results"):
            dist.broadcast_object_list(holder, self._first, group=self._control)
        return holder[0]

    # Tensors

    def all_reduce(self, tensor: torch.Tensor, purpose: str = "all_reduce") -> torch.Tensor:
        """The sum over all ranks, in place."""
        self._count(purpose, tensor.nbytes)
        dist.all_reduce(tensor, group=self._sums)
        return tensor

    def all_gather(self, tensor: torch.Tensor, purpose: str = "gather") -> torch.Tensor:
        """[size, ...] of what every rank gave, which has the same shape on all of them."""
        self._count(purpose, tensor.nbytes)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self._sums)
        return torch.stack(parts)

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor, in place on the others."""
        self._count("tensors", tensor.nbytes)
        dist.broadcast(tensor, self._first, group=self._sums)
        return tensor

    def _count(self, purpose: str, num_bytes: int) -> None:
        self.traffic[purpose] += num_bytes
        self.traffic[f"calls {purpose}"] += 1

    # Agreement, on the host

    def gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        """What every rank gave: equally many integers of 64 bits each."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with self.together("agreement"):
            dist.all_gather(parts, mine, group=self._control)
        return [part.tolist() for part in parts]

    def least(self, numbers: list[int]) -> list[int]:
        """Of each number the smallest that a rank gave."""
        return [min(column) for column in zip(*self.gather_numbers(numbers))]

    def unanimous(self, vote: bool) -> bool:
        """Whether all ranks say yes."""
        return bool(self.least([int(vote)])[0])

    def check_alike(self, what: str, value: str) -> None:
        """Raise ParallelError on every rank, naming those that differ from rank 0, unless all have the same `value`."""
        digests = [row[0] for row in self.gather_numbers([digest(value.encode())])]
        others = [rank for rank, found in enumerate(digests) if found != digests[0]]
        if others:
            raise ParallelError(f"{what} of rank {', '.join(map(str, others))} is not that of rank 0")

    # Failure and end

    @contextmanager
    def together(self, what: str):
        """While inside, this rank depends on the others: if one dies, hangs or fails, this raises ParallelError.

        What else goes wrong inside goes to the others as the reason why this one fails.
        """
        self.check()
        with self.engaged():
            try:
                yield
            except BaseException as error:  # an interrupt, too, leaves the others in the middle of something
                raise self.broken(what, error) from error

    def engaged(self):
        """Scope in which this rank waits for others: if the team fails, the process ends unless it leaves soon."""
        return self._heart.engaged()

    def broken(self, what: str, error: BaseException) -> BaseException:
        """`error` came in the middle of something that all ranks do: tell them. Returns what is to be raised."""
        self.fail(error)
        if not isinstance(error, Exception) or isinstance(error, ParallelError):
            return error
        return self._heart.wait_for_error(self._reason(error, f" ({what})"))

    def check(self) -> None:
        """Raise ParallelError if the team has failed or was closed."""
        if self._closed:
            raise ParallelError("the model was unpatched on this rank")
        if self._heart.error is not None:
            raise ParallelError(self._heart.error)

    @property
    def failed(self) -> bool:
        return self._heart.error is not None

    def fail(self, error: BaseException) -> None:
        """Tell all ranks that this one cannot go on."""
        self._heart.fail(self._reason(error))

    def _reason(self, error: BaseException, where: str = "") -> str:
        if isinstance(error, ParallelError):
            return str(error)
        said = ": ".join(filter(None, (type(error).__name__, str(error))))
        return why_lost(error) or f"rank {self.rank} failed{where}: {said}"

    def on_failure(self, callback: Callable[[], None]) -> None:
        """Call it, in another thread, when the team fails or a rank is gone."""
        self._heart.on_failure(callback)

    def _abort(self) -> None:
        """Wake who waits on the device. (gloo's sums give up by themselves.)"""
        if not self._owns_sums and hasattr(self._sums, "abort"):
            self._sums.abort()

    def close(self) -> None:
        """Together with the other ranks. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._heart.stop()


def digest(data: bytes) -> int:
    """63 bits."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) >> 1


def ranks_on_this_machine(size: int) -> int:
    """How many of the team's ranks share this machine's memory, as the launcher says; else all of them."""
    return max(1, min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size))))
