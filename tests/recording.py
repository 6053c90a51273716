"""A stand-in for CUDA graphs on CPU: it records every torch operation and Triton launch, and repeats just those.

As on a GPU, what Python decided while recording is decided for good: only numbers in tensors are read anew. Before each
replay everything the recording had allocated is filled with garbage, and an operation that would have to wait for the
device fails.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hf_paged.runtime.graphs import refusing_to_wait
from hf_paged_kernels.triton import launch as launching

CPU = torch.device("cpu")


class Recorder:
    """A `graphs.Capture`."""

    def __init__(self, device: torch.device = CPU):
        self.num_bytes = 0

    def warm_up(self, run: Callable[[], torch.Tensor]) -> None:
        with refusing_to_wait(CPU), _launches(_interpret):
            run()

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        tape = _Tape()
        with tape, _launches(tape.launched):
            result = run()
        self.num_bytes += 1 << 20

        def replay() -> torch.Tensor:
            tape.play()
            return result

        return replay

    def close(self) -> None:
        self.num_bytes = 0


def counting(make: type) -> type:
    """A `graphs.Capture` like `make`, of which each counts what is asked of it; those that are used are in `used`, in order."""

    class Counting(make):
        used: list[Counting] = []
        num_warm_ups = num_records = num_replays = 0

        def warm_up(self, run):
            if not self.num_warm_ups:
                self.used.append(self)
            self.num_warm_ups += 1
            super().warm_up(run)

        def record(self, run):
            self.num_records += 1
            replay = super().record(run)

            def counted():
                self.num_replays += 1
                return replay()

            return counted

    return Counting


@contextmanager
def _launches(launched: Callable):
    """While inside, `launched(kernel, grid, args, meta)` is called for every Triton launch."""
    before, launching._recorder = launching._recorder, launched
    try:
        yield
    finally:
        launching._recorder = before


def _interpret(kernel, grid, args, meta) -> None:
    with _disable_current_modes():  # what the interpreter does on the way is no part of the work
        kernel[grid](*args, **meta)


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self._steps: list[Callable[[], None]] = []
        self._allocated: dict[int, torch.Tensor] = {}

    def launched(self, *launch) -> None:
        _interpret(*launch)
        self._steps.append(lambda: _interpret(*launch))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = function(*args, **kwargs)
        given = {_place(tensor) for tensor in _tensors((args, kwargs))}
        made = [_place(tensor) not in given for tensor in _tensors(outputs)]
        for tensor, new in zip(_tensors(outputs), made):
            if new:
                self._allocated[_place(tensor)] = tensor

        sums = function.namespace == "c10d"  # in place, though their schemas do not say so

        def run() -> None:
            again = function(*args, **kwargs)
            if sums:
                again[-1].wait()
            for tensor, value, new in zip(_tensors(outputs), _tensors(again), made):
                if new:
                    tensor.copy_(value)

        if any(made) or function._schema.is_mutable or sums:
            self._steps.append(run)
        return outputs

    def play(self) -> None:
        for tensor in self._allocated.values():
            garbage = float("nan") if tensor.is_floating_point() else 1
            torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).fill_(garbage)
        for step in self._steps:
            step()


def _tensors(values) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
