"""What every adapter shares: a swapped attention module that hands its heads to the running step."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch

from ...base.errors import UnsupportedModel
from ...runtime.batch import active_context
from ..swap import Swapped


@dataclass(frozen=True)
class Layer:
    """State of a swapped attention module: what the step and `explain` need to know of its layer.

    Attributes:
        layer_idx: its number among the model's attention layers.
        scale: factor of q.k before the softmax.
        kind: what `explain` adds to its description.
        window: latest positions a query sees, where the module's own code says so and not `config.layer_types`.
        slopes: [Hq] ALiBi slopes, or None.
        max_positions: the most positions that what it keeps is made for; None: any.
        shift_free: whether the model sees differences of positions only, so that left padding cannot change a row.
    """

    layer_idx: int
    scale: float
    kind: str | None = None
    window: int | None = None
    slopes: torch.Tensor | None = None
    max_positions: int | None = None
    shift_free: bool = False


@dataclass(frozen=True)
class PaddingFlaw:
    """Stock's own rows depend on the padding on their left, once a batch has `columns` columns."""

    reason: str
    columns: int = 0


@dataclass(frozen=True)
class Place:
    """State of a swapped attention module that does not know which layer it is in."""

    layer_idx: int


class PlacedAttention(Swapped):
    """Mixin of attention modules on transformers' attention interface that are told their layer by the call. State: Place."""

    @staticmethod
    def fits(module: torch.nn.Module) -> bool:
        unplaced = getattr(module, "layer_idx", 0) in (None, -1)
        return unplaced and "layer_idx" in inspect.signature(type(module).forward).parameters

    @staticmethod
    def describe(name: str) -> Place:
        """The Place of a module by its path: the number in it is its layer's."""
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if not numbers:
            raise UnsupportedModel(f"model: {name} is told its layer by the call, and does not stand in a list of layers")
        return Place(numbers[0])

    @property
    def layer_idx(self) -> int:
        return self._hf_paged.layer_idx


class StockForm:
    """How transformers' own cache keeps a layer's keys and values: here as the pages do."""

    def to_stock(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [n, Hkv, Dk] and values [n, Hkv, Dv] from pages -> as transformers caches them, [n, H, D] each."""
        return key, value

    def from_stock(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The way back, for tokens at `positions` [n]."""
        return key, value


class PagedAttention(StockForm, Swapped):
    """Mixin of attention modules that compute their own softmax. State: Layer.

    A subclass overrides the method that holds the softmax. Outside a step the module's own runs.
    """

    BYPASSED: tuple[str, ...] = ()  # submodules that are not called inside a step; nobody may wait for them

    @classmethod
    def describe(cls, module: torch.nn.Module, index: int) -> Layer:
        """The Layer of `module`, the `index`-th attention module of its model. Raises UnsupportedModel."""
        raise NotImplementedError

    def _step(self):
        """The step (or probe) this thread is in, or None: then the module's own code must run."""
        context = active_context()
        if context is not None:
            for name in self.BYPASSED:
                child = getattr(self, name)
                if child._forward_hooks or child._forward_pre_hooks:
                    raise UnsupportedModel(
                        f"{type(self).__name__}.{name} has a forward hook, but the paged kernel has no attention "
                        "weights to show it; remove the hook, or unpatch the model"
                    )
        return context

    def _attend(self, context, query, key, value, *, slopes=None) -> torch.Tensor:
        """query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv] of the packed batch -> [1, T, Hq * Dv]."""
        layer = self._hf_paged
        output = context.attend(
            layer.layer_idx, query, key.to(value.dtype), value, scale=layer.scale, alibi_slopes=slopes
        )
        return output.to(value.dtype).flatten(1)[None]


def packed(heads: torch.Tensor) -> torch.Tensor:
    """[1, H, T, D] as attention modules arrange heads -> [T, H, D] as the step takes them."""
    return heads[0].transpose(0, 1)
