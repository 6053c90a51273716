"""How many kernels a decoder layer launches."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that only make or describe tensors; views are told by the operation itself.
_NO_KERNEL = frozenset("empty empty_like empty_strided new_empty new_empty_strided _unsafe_view".split())


class Launches(TorchDispatchMode):
    """While entered: torch operations of this thread that compute something, and launches of our own kernels.

    Attributes:
        names: of both, in order.
    """

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self._inside = False  # a launch: in the interpreter it is made of torch operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not (self._inside or func.is_view or name in _NO_KERNEL):
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def launch(self, kernel):
        self.names.append(kernel.fn.__name__)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False


@contextmanager
def counting(layers: list[torch.nn.Module]):
    """While inside, a list for every call of one of `layers`: what it launched, by name."""
    from hf_paged_kernels.triton.launch import observing

    calls: list[list[str]] = []
    running: list[ExitStack] = []

    def enter(*_):
        stack, launches = ExitStack(), Launches()
        stack.enter_context(observing(launches.launch))
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
