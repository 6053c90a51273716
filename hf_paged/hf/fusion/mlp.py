"""Gated MLPs: act(gate) * up from one projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from hf_paged_kernels import fused
from hf_paged_kernels.norm import Norm
from hf_paged_kernels.quantized import QuantizedWeight

from ...runtime.batch import active_context
from ..swap import Swapped, can_swap
from ..weights import has_known_weight, weight_of
from .adapted import adapted_linear
from .base import LINEAR, Bypass, Fusions, Parts, is_plain
from .linear import project, rows_for
from .merged import GATE_UP, Merged, merged_of
from .norm import takes_one_input
from .proof import stands_for

ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu"}
JOINED = "gate_up_proj"


@dataclass
class _MLP(Bypass):
    """
    Attributes:
        merged: gate and up in one; None where the module itself has a `gate_up_proj`.
        parts: what is bypassed in any case; a `gate_up_proj` or `down_proj` that is more than a linear layer is called.
    """

    KIND = "mlp"

    module: nn.Module
    backend: str
    activation: str
    merged: Merged | None
    parts: Parts

    def untouched(self) -> bool:
        return self.parts.untouched() and (self.merged is None or self.merged.joined)

    @property
    def first_weight(self) -> Tensor | QuantizedWeight | None:
        """Of gate and up; None where they are not a plain layer."""
        if self.merged is not None:
            return self.merged.weight
        gate_up = self.module._modules[JOINED]
        return weight_of(gate_up) if is_plain(gate_up) else None

    def run(self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """residual + down(act(gate(norm(x))) * up(norm(x)))."""
        children, weight = self.module._modules, self.first_weight
        gate_up = self.merged or children[JOINED]
        if weight is not None:
            options = dict(norm=norm, activation=self.activation, backend=self.backend)
            h = adapted_linear(active_context(), gate_up, x, weight, gate_up.bias, **options)
        else:
            if norm is not None:
                x = fused.rms_norm(x, *norm[:2], offset=norm.offset, cast=norm.cast, backend=self.backend)
            h = fused.act_and_mul(gate_up(x), self.activation, backend=self.backend)
        return project(children["down_proj"], h, residual, self.backend)


class FusedMLP(Swapped):
    def forward(self, x):
        if active_context() is None or not self._hf_paged.untouched():
            return super().forward(x)
        return self._hf_paged.run(x)


def fuse_mlp(module: nn.Module, fusions: Fusions) -> None:
    children = module._modules
    act = next((name for name in ("act_fn", "activation_fn") if children.get(name) is not None), None)
    kind = ACTIVATIONS.get(type(children.get(act)).__name__)
    down = getattr(children.get("down_proj"), "base_layer", children.get("down_proj"))
    if kind is None or not isinstance(down, LINEAR) or not can_swap(module) or not takes_one_input(module):
        return
    merged = merged_of(module, GATE_UP)
    if merged is not None:
        first, names = children["gate_proj"], (*GATE_UP, act)
    elif isinstance(children.get(JOINED), LINEAR) and has_known_weight(children[JOINED]):
        first, names = children[JOINED], (act,)
    else:
        if any(hasattr(children.get(name), "base_layer") for name in GATE_UP):
            fusions.notes[type(module).__name__] = "an adapter is on its gate_proj or up_proj"
        return
    state = _MLP(module, fusions.backend, kind, merged, Parts(module, *names))
    x = rows_for(first, fusions)
    if stands_for(lambda: state.run(x), module, x, tolerance=1e-4, backend=fusions.backend):
        fusions.swap(module, FusedMLP, state, "mlp")
    else:
        fusions.notes[type(module).__name__] = "its formula is not act(gate) * up"
