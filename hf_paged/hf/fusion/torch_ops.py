"""What a modeling file computes with torch's own kernels, in exact mode.

Two kinds of them give a row other bits in other batches. Products of matrices choose their order of sums by their size:
`F.linear` on a parameter, as routers and heads that are no modules call it, goes to the kernel that nn.Linear has in a
step; others cannot be told to, and are noted when the model is patched. And functions of single numbers, such as SiLU,
run in vectors, but what is left at the end of a tensor, or of a thread's share of it, by another formula, off by a bit: they
are given tensors that leave nothing.
"""

from __future__ import annotations

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_paged_kernels import fused

from ...runtime.batch import active_context
from ..swap import Swapped, can_swap, swap
from .base import Fusions

_MATRICES = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm}
_PRODUCTS = {
    *(torch.addmm, torch.baddbmm, torch.einsum, torch.mv, torch.tensordot, torch.inner, torch.dot, Tensor.addmm),
    *(torch.conv1d, torch.conv2d, F.conv1d, F.conv2d, F.bilinear, F.scaled_dot_product_attention),
    *(function for function in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if function),
}
_FUNCTIONS = {  # of single numbers, whose vectors have a formula of their own
    *(F.silu, F.gelu, F.softplus, F.mish, F.elu, F.sigmoid, F.tanh, torch.erf, Tensor.erf),
    *(getattr(home, name) for home in (torch, Tensor) for name in ("exp", "log", "tanh", "sigmoid", "cos", "sin", "pow")),
    *(Tensor.__pow__, torch.square, Tensor.square),
}
_GRAIN = 32768  # elements that torch gives a thread at least (at::internal::GRAIN_SIZE)
_VECTORS = 64  # elements of the longest run of vectors that torch takes at once


class TorchOps(TorchFunctionMode):
    """While entered, torch's functions give a row the same bits beside whatever others, as far as they can.

    Args:
        backend: whose kernels there are.

    Attributes:
        others: names of functions that cannot.
        callers: ids of the modules in whose code such functions were called, while `noting`; None for code of no module's.
    """

    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend
        self.noting = False
        self.callers: set[int | None] = set()
        self.others: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            self._note()
            return self._linear(*args, **kwargs)
        if func in _FUNCTIONS and args and isinstance(args[0], Tensor) and "out" not in kwargs:
            self._note()
            return _by_vectors(func, *args, **kwargs)
        if func in _PRODUCTS or func in _MATRICES and not _is_outer(*args[:2]):
            self.others.add(func.__name__)
        return func(*args, **kwargs)

    def _note(self) -> None:
        if not self.noting:
            return
        frame = sys._getframe(2)
        while frame is not None and not isinstance(frame.f_locals.get("self"), torch.nn.Module):
            frame = frame.f_back
        self.callers.add(None if frame is None else id(frame.f_locals["self"]))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = fused.exact_linear(input, weight, bias, backend=self.backend)
        if y is None:
            self.others.add("linear")
            return F.linear(input, weight, bias)
        return y


def _by_vectors(function, x: Tensor, *args, **kwargs) -> Tensor:
    """function(x), every number by the same formula."""
    if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        return function(x, *args, **kwargs)
    if x.device.type != "cpu":  # a thread for every number
        return function(x, *args, **kwargs)
    count = x.numel()
    length = _length(count, torch.get_num_threads())
    if length == count and x.is_contiguous():
        return function(x, *args, **kwargs)
    padded = x.new_ones(length)
    padded[:count] = x.reshape(-1)
    return function(padded, *args, **kwargs)[:count].view(x.shape)


def _length(count: int, threads: int) -> int:
    """The least length from `count` on of which every thread's share is whole vectors."""
    if not count:
        return 0
    shares = min(threads, math.ceil(count / _GRAIN))
    length = math.ceil(count / (shares * _VECTORS)) * shares * _VECTORS
    return length if min(threads, math.ceil(length / _GRAIN)) == shares else _length(length, threads)


def _is_outer(a, b=None) -> bool:
    """Whether every number of a @ b is a single product, as of angles and positions."""
    return isinstance(b, Tensor) and a.shape[-1:] == (1,)


class WithTorchOps(Swapped):
    """A module whose own code calls such functions. State: the TorchOps that its steps run under."""

    def forward(self, *args, **kwargs):
        if active_context() is None:
            return super().forward(*args, **kwargs)
        with self._hf_paged:
            return super().forward(*args, **kwargs)


def scope_torch_ops(ops: TorchOps, model: torch.nn.Module, fusions: Fusions) -> bool:
    """Let the modules that `ops` saw calling its functions enter it by themselves, so that nobody else pays for it: every call
    of torch's passes through what is entered. False if that cannot be, and whole forwards must run under it."""
    callers = [module for module in model.modules() if id(module) in ops.callers]
    if len(callers) != len(ops.callers) or not all(map(can_swap, callers)):
        return False
    for module in callers:
        swap(module, WithTorchOps, ops)
        fusions.swapped.append(module)  # `undo` restores it; it is no fused form to be counted
    return True
