"""How many kernels a decoder layer launches."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that only make or describe tensors; views are told by the operation itself.
_NO_KERNEL = frozenset("empty empty_like empty_strided new_empty new_empty_strided _unsafe_view".split())


class Launches(TorchDispatchMode):
    """While `counting` is on: torch operations that compute something, and launches of our own kernels.

    Attributes:
        names: of both, in order.
    """

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self._thread = threading.get_ident()
        self._inside = False  # a launch: in the interpreter it is made of torch operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not (self._inside or func.is_view or name in _NO_KERNEL):
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def launched(self, kernel, grid: tuple, args: tuple, meta: dict) -> None:
        """Launches, as `triton.launch.recording` has it done."""
        mine = threading.get_ident() == self._thread
        if mine:
            self.names.append(kernel.fn.__name__)
        self._inside = mine
        try:
            kernel[grid](*args, **meta)
        finally:
            self._inside = False


@contextmanager
def counting(layers: list[torch.nn.Module], device: torch.device):
    """While inside, one list a call of one of `layers`: what it launched, by name."""
    from hf_paged_kernels.triton import launch

    calls: list[list[str]] = []
    running: list[ExitStack] = []

    def enter(*_):
        stack, launches = ExitStack(), Launches()
        stack.enter_context(launch.recording(launch.arch(device), launches.launched))
        stack.enter_context(launches)
        calls.append(launches.names)
        running.append(stack)

    def leave(*_):
        running.pop().close()

    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
