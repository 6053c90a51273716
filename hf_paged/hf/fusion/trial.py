"""A module that attends, and what may stand in for it, on the same random rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ...runtime.batch import activate
from ..attention import attention_configs, paged_attention
from .calls import Attended, Call, LayerProbe
from .proof import agree, agree_rounded, plain_copy, proven
from .rounding import on_kernels, rounds_inputs, unrounded

TOLERANCE = 1e-4  # of fp32 results, relative to a row's largest value: sums over thousands of terms in another order


@dataclass
class Result:
    """What a forward returned [1, T, H], and what it asked of attention."""

    output: Tensor
    attended: Attended

    def parts(self) -> dict[str, Tensor]:
        """Name -> [T, N]."""
        heads = {name: getattr(self.attended, name).flatten(1) for name in ("query", "key", "value")}
        return {**heads, "output": self.output[0]}


class Trial:
    """
    Args:
        module: called by its model as `call` says.
        x: [1, T, H].
        unpack: the output [1, T, H] in what the module returns; None if it returns something else.
        positions: [T].
    """

    def __init__(
        self, module: nn.Module, call: Call, x: Tensor, unpack: Callable, positions: Tensor, backend: str
    ) -> None:
        self.module, self.call, self.x = module, call, x
        self._unpack, self._positions, self._backend = unpack, positions, backend

    @cached_property
    def own(self) -> Result | None:
        """The module's own forward, with its parts fused as they are; None if it is nothing of the kind."""
        return self._own(self.module, self.x)

    def difference(self, run: Callable) -> str | None:
        """What `run(context, x, position_embeddings)` gets otherwise than the module; None if it may take its place."""
        if not rounds_inputs(self.module):
            return self._compare(run, self._stock() if self._is_loose else self.own, self._truth, agree)
        with unrounded(self.module):
            truth = self._truth()
            reason = self._compare(run, self._stock(), lambda: truth, agree)
        return reason or self._compare(run, self._stock(), lambda: truth, agree_rounded)

    @property
    def _is_loose(self) -> bool:
        """Whether fused forms may round otherwise than the module."""
        return self._backend == "triton" and self.x.dtype != torch.float32

    def _stock(self) -> Result | None:
        return self._own(plain_copy(self.module) if self._is_loose else self.module, self.x)

    def _truth(self) -> Result | None:
        return self._own(plain_copy(self.module).float(), self.x.float())

    def _compare(self, run: Callable, own: Result | None, truth: Callable, agree: Callable) -> str | None:
        fused = self._try(lambda context: run(context, self.x, self.call.arguments["position_embeddings"]))
        if fused is None:
            return "number of attentions"
        exact = truth() if self._is_loose or agree is agree_rounded else None
        if own is None or exact is None and self._is_loose:
            return "copy"
        expected, exact = own.parts(), {} if exact is None else exact.parts()
        for name, mine in fused.parts().items():
            if not proven(
                agree(mine, expected[name], tolerance=TOLERANCE, backend=self._backend, truth=exact.get(name))
            ):
                return name
        return None

    def _own(self, module: nn.Module, x: Tensor) -> Result | None:
        with paged_attention(attention_configs(module)), on_kernels(module, self._backend):
            try:
                return self._try(lambda context: self._unpack(self.call.replay(module, x)))
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # it wants more than it got
                return None

    def _try(self, forward: Callable) -> Result | None:
        with activate(LayerProbe(self._positions, self.x.dtype, self._backend)) as context:
            output = forward(context)
        if not isinstance(output, Tensor) or output.dim() != 3 or len(context.attended) != 1:
            return None
        return Result(output, context.attended[0])
