"""CUDA graphs for decode: the forward of a step in which every sequence has one new token, recorded once and replayed.

A graph is recorded for a number of sequences; a step runs the next larger one, padded with sequences that read and write
nothing. What it reads are buffers that do not move (`inputs.StagedInputs`), the KV cache and the live weights. Whatever
would make a recorded forward differ from the module's own keeps it from being recorded, and is reported.

Of a sharded model, ranks record together, as what is recorded is run several times, with sums that all take part in. After
each of these times they ask each other whether it went well; if it did not on one of them, none has a graph. A replay and
a forward of its own sum the same things in the same order, so ranks need not agree on which of the two they run.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.errors import UnsupportedOption
from ..parallel.team import Team

T = TypeVar("T")
GRAPH_BYTES = 16 << 20  # of the driver, for the nodes of one graph: a few hundred kernels

# Most by which a recorded forward's logits may differ from its own, relative to the largest: they are the same kernels,
# but some add up in an order of their own every time.
LIMIT = 1e-4
LIMIT_NARROW = 2e-2


class WaitsForDevice(RuntimeError):
    """The forward reads a value from the device, which a graph cannot."""


class _Failed(Exception):
    """A forward was not recorded."""


class _OtherLogits(Exception):
    pass


class Capture(Protocol):
    """Records work on the device."""

    num_bytes: int  # device memory that everything recorded so far keeps

    def warm_up(self, run: Callable[[], Tensor]) -> None:
        """Call `run` as `record` will. Raises WaitsForDevice if its work cannot be recorded for that reason."""
        ...

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Call `run` once, without its work being done, and return what does the work, and returns its result.

        All that is recorded shares its memory: a result is valid until something else is replayed or recorded. Raises
        what `run` raises, or why its work cannot be recorded; the device is then as it was before.
        """
        ...

    def close(self) -> None:
        """Give all memory back. What was recorded must not be replayed any more."""
        ...


def ladder(most: int) -> list[int]:
    """The numbers of sequences that graphs are recorded for: dense enough that little is padded."""
    sizes = [size for size in (1, 2, 4) if size < most]
    sizes += range(8, min(most, 512), 8)
    size = 512
    while size < most:
        sizes.append(size)
        size += size // 8
    return [*sizes, most]


class DecodeGraphs:
    """The recorded forwards of one model on one cache.

    Args:
        capture: what records; see `cuda_capture`.
        most: most sequences of a step.
        team: the ranks of a sharded model, whose graphs all of them record at the same time.

    Attributes:
        problem: why nothing more is recorded; None while all is well.
    """

    def __init__(self, capture: Capture, most: int, team: Team | None = None):
        self.problem: str | None = None
        self.sizes = ladder(most)
        self._capture = capture
        self._team = team
        self._graphs: dict[int, Callable[[], Tensor]] = {}
        self._valid_for: object = None

    @property
    def recorded(self) -> list[int]:
        """Numbers of sequences there is a graph for."""
        return sorted(self._graphs)

    @property
    def num_bytes(self) -> int:
        """Device memory that the graphs keep."""
        return self._capture.num_bytes if self._graphs else 0

    def size_for(self, num_seqs: int, valid_for: object) -> int | None:
        """The number of sequences to pad a step of `num_seqs` to; None if it must run as it is. See `lacks`."""
        if self.problem is not None and valid_for != self._valid_for:
            self.clear()
        if self.problem is not None or num_seqs > self.sizes[-1]:
            return None
        return self.sizes[bisect_left(self.sizes, num_seqs)]

    def lacks(self, size: int, valid_for: object) -> bool:
        """Whether a forward of `size` sequences, as `size_for` said, has to be recorded before it can be replayed.

        Args:
            valid_for: what graphs recorded earlier must have been recorded for: equal as long as nothing that the forward
                refers to has moved or changed.
        """
        if valid_for != self._valid_for:
            self.clear()
            self._valid_for = valid_for
        return size not in self._graphs

    def replay(self, size: int) -> Tensor:
        """What was recorded does its work on the current contents of its buffers. Valid until something else is run here."""
        return self._graphs[size]()

    def record(self, size: int, forward: Callable[[], Tensor]) -> Tensor:
        """`forward()` of a step, which is recorded if it does the same when it is replayed; else all graphs are dropped."""
        expected, problem = forward().clone(), None
        try:
            self._attempt(size, lambda: self._capture.warm_up(forward), sums=True)
            replay = self._attempt(size, lambda: self._capture.record(forward), sums=False)
            self._attempt(size, lambda: _check_alike(replay(), expected), sums=True)
        except _Failed as failure:
            problem = str(failure)
        if problem is None:
            self._graphs[size] = replay
            return expected
        replay, self.problem = None, problem
        self._drop()
        return forward()  # what it has written may be wrong

    def _attempt(self, size: int, part: Callable[[], T], *, sums: bool) -> T:
        """`part()`, a part of recording. Raises _Failed, saying what is wrong, if it went wrong here or on another rank.

        Args:
            sums: the ranks wait for each other inside. What is raised there on one alone is not for the others to be asked
                about, but ends the team; that the forward waits for the device, all of them find at the same place.
        """
        result = problem = None
        try:
            result = part()
        except _OtherLogits as error:
            problem = f"a recorded step of {size} sequences {error}"
        except Exception as error:  # the step itself runs, or fails, without
            if self._team is not None and sums and not isinstance(error, WaitsForDevice):
                raise
            reason = str(error).strip().splitlines() or [""]
            problem = f"recording a step of {size} sequences failed with {type(error).__name__}: {reason[0]}"
        if self._team is not None:
            votes = self._team.gather_numbers([int(problem is None)])
            bad = [rank for rank, [well] in enumerate(votes) if not well]
            if bad and problem is None:
                problem = f"recording a step of {size} sequences failed on rank {bad[0]}"
        if problem is not None:
            raise _Failed(problem)
        return result

    def _drop(self) -> None:
        self._graphs.clear()
        self._capture.close()

    def clear(self) -> None:
        """Drop every graph, and what kept others from being recorded: the forward is another one now."""
        self.problem = None
        self._valid_for = None
        if self._graphs:
            self._drop()


def _check_alike(logits: Tensor, expected: Tensor) -> None:
    difference = _difference(logits, expected)
    if difference > (LIMIT if expected.dtype == torch.float32 else LIMIT_NARROW):
        raise _OtherLogits(f"gave other logits, off by {difference:.1g} of the largest")


def _difference(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest of the expected logits that are numbers."""
    sound = expected.isfinite()
    gap = torch.where(sound, logits.float() - expected.float(), 0.0).abs().max()
    scale = torch.where(sound, expected.float(), 0.0).abs().max().clamp_min(1e-6)
    return float((gap / scale).nan_to_num(nan=float("inf")))


@contextmanager
def refusing_to_wait(device: torch.device):
    """While inside, an operation that waits for `device` raises WaitsForDevice, in this thread alone.

    Found here, it costs nothing; found by the driver in the middle of a recording, it breaks the recording.
    """
    with _NoWaiting(device.type):
        yield


class _NoWaiting(TorchDispatchMode):
    def __init__(self, kind: str):
        super().__init__()
        self._kind = kind

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._waits(function, args, kwargs):
            raise WaitsForDevice(f"the forward waits for the device ({function.name()})")
        return function(*args, **kwargs)

    def _waits(self, function, args, kwargs) -> bool:
        tags, name = function.tags, function.overloadpacket.__name__
        kinds = {value.device.type for value in args if isinstance(value, Tensor)}
        if name in ("_to_copy", "copy_"):
            if kwargs.get("device") is not None:
                kinds.add(torch.device(kwargs["device"]).type)
            blocking = not kwargs.get("non_blocking") and not (name == "copy_" and len(args) > 2 and args[2])
            return self._kind in kinds and len(kinds) > 1 and blocking
        if self._kind not in kinds:
            return False
        if torch.Tag.dynamic_output_shape in tags:
            if name == "index":
                return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            return kwargs.get("output_size") is None
        return torch.Tag.data_dependent_output in tags


def cuda_capture(device: torch.device) -> Capture:
    """Records CUDA graphs on `device`. Raises UnsupportedOption for any other."""
    if device.type != "cuda":
        raise UnsupportedOption(f"cuda_graphs: the model is on {device}, which has none; use cuda_graphs=None or False")
    return CudaCapture(device)


class CudaCapture:
    """CUDA graphs that share one memory pool. A `Capture`."""

    def __init__(self, device: torch.device):
        self.num_bytes = 0
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._broken: list[torch.cuda.CUDAGraph] = []  # the allocator may still refer to them

    def warm_up(self, run: Callable[[], Tensor]) -> None:
        """Compiles kernels, and takes the workspaces that libraries keep for the stream of recordings."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), refusing_to_wait(self._device):
                run()
        finally:
            current.wait_stream(self._stream)

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        current = torch.cuda.current_stream(self._device)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate meanwhile: only what this one does must be fit for a graph.
            options = dict(pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            with _without_gc(), torch.cuda.graph(graph, **options):
                result = run()
        except BaseException:
            self._clean_up(graph, current)
            raise
        self.num_bytes += max(0, free - torch.cuda.mem_get_info(self._device)[0])
        view = _unowned(result)
        del result  # the next graph may use its memory: a result is read before anything else is replayed

        def replay() -> Tensor:
            graph.replay()
            return view

        return replay

    def _clean_up(self, graph: torch.cuda.CUDAGraph, current: torch.cuda.Stream) -> None:
        """Leave stream and allocator as they were before a recording that failed.

        If the recording itself broke, torch leaves the recording stream current, and its allocator in the belief that it
        goes on.
        """
        torch.cuda.set_stream(current)
        self._broken.append(graph)
        index = current.device.index
        with suppress(RuntimeError):  # it had ended in good order
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self._device)

    def close(self) -> None:
        self.num_bytes = 0
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


@contextmanager
def _without_gc():
    """No garbage collection while recording: what it destroys might call the driver."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _unowned(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that does not keep it."""

    class Memory:
        __cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
            "typestr": f"<i{tensor.element_size()}",
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }

    return torch.as_tensor(Memory(), device=tensor.device).view(tensor.dtype)
