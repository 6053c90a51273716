"""What was fused in a model, and what fused forms must watch: the parts whose own forward they do not call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ...quant.linear import QuantLinear
from ..swap import Swapped, restore, swap
from ..watch import is_hooked, only_recorders
from ..weights import has_known_weight, weight_of
from .sharded import ColumnLinear


class Parts:
    """Submodules that a fused form stands in for, as they were when it was proven.

    Args:
        module: their parent.
        names: of the children; None and names of no child are left out.
        attention: a child whose recorders of attention weights do not count: on pages there are none to record.
    """

    def __init__(self, module: nn.Module, *names: str | None, attention: str | None = None):
        present = [name for name in (*names, attention) if module._modules.get(name) is not None]
        children = [(module._modules, name, module._modules[name]) for name in present]
        self._places = [(*place, place[2].__dict__, place[1] == attention) for place in children]

    def untouched(self) -> bool:
        """Whether all of them are still in place, with nothing but their class's own forward to run."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return False
        for siblings, name, then, own, attends in self._places:
            if siblings.get(name) is not then or own["_forward_pre_hooks"] or "forward" in own:
                return False
            if own["_forward_hooks"] and not (attends and only_recorders(then)):
                return False
        return True


def idle_children(module: nn.Module) -> set[str]:
    """Names of children that pass on what they are given, in a step: everything is in eval mode there."""
    return {name for name, child in module._modules.items() if type(child) in (nn.Dropout, nn.Identity)}


LINEAR = (nn.Linear, QuantLinear)


def is_linear(layer: nn.Module) -> bool:
    """Whether `layer` is a linear layer, or a rank's columns of one, and no more."""
    return type(layer) in LINEAR or isinstance(layer, ColumnLinear) and not isinstance(layer, Swapped)


def width_of(layer: nn.Module) -> int:
    """How many outputs a linear layer has on this rank."""
    return weight_of(layer).shape[0] if isinstance(layer, ColumnLinear) else layer.out_features


def is_plain(layer: nn.Module) -> bool:
    """Whether calling `layer` is no more than y = x W^T + b, which nobody watches."""
    from .adapted import AdaptedLayer
    from .linear import FusedLinear

    plain = type(layer)._hf_paged_base if isinstance(layer, AdaptedLayer) else type(layer)
    known = plain in LINEAR or isinstance(layer, FusedLinear)
    return known and has_known_weight(layer) and not is_hooked(layer)


@dataclass
class Fusions:
    """What was fused in one model, with reasons for what was not; `undo` takes it all back.

    Attributes:
        backend: whose kernels the fused forms call, resolved: "cpu", "triton" or "reference".
        like: of the dtype and on the device of the model's hidden states.
        exact: rows of linear layers get the same bits in any batch.
        counts: kind -> fused modules.
        notes: slower paths and their reasons.
        expert_configs: configurations whose experts implementation is ours inside a step.
        eager_configs: configurations whose experts run one after another inside a step.
        alone: class name -> why attention modules or layers of that class run their own code, part by part.
    """

    backend: str = "reference"
    like: Tensor = field(default_factory=lambda: torch.empty(0))
    exact: bool = False
    swapped: list[nn.Module] = field(default_factory=list)
    merged: list = field(default_factory=list)
    unwrap: list[Callable[[], None]] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    notes: dict[str, str] = field(default_factory=dict)
    expert_configs: list = field(default_factory=list)
    eager_configs: list = field(default_factory=list)
    alone: dict[str, str] = field(default_factory=dict)

    def swap(self, module: nn.Module, mixin: type, state, kind: str) -> None:
        swap(module, mixin, state)
        self.swapped.append(module)
        self.counts[kind] += 1

    def stepping_aside(self) -> dict[str, list[nn.Module]]:
        """Kind -> fused modules whose own forward runs for now, because a part they bypass was hooked or replaced."""
        aside: dict[str, list[nn.Module]] = {}
        for module in self.swapped:
            state = module._hf_paged
            if isinstance(state, Bypass) and not state.untouched():
                aside.setdefault(state.KIND, []).append(module)
        return aside

    def rejoin(self) -> None:
        for merged in self.merged:
            if not merged.intact():
                merged.rejoin()

    def undo(self) -> None:
        for module in self.swapped:
            restore(module)
        for merged in self.merged:
            merged.separate()
        for unwrap in self.unwrap:
            unwrap()
        self.swapped, self.merged, self.unwrap, self.expert_configs = [], [], [], []


class Bypass:
    """Base of the states of fused forms that do not call some submodules."""

    KIND: str

    def untouched(self) -> bool:
        raise NotImplementedError
