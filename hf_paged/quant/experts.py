"""The experts of a mixture-of-experts layer on quantized weights, in place of a module that holds them stacked.

Checkpoints store every expert's projections by themselves (`experts.0.gate_proj.qweight`). `ExpertLayers` has those
tensors' names, for a loader to fill; `QuantExperts` holds them stacked, [E, N, K], as the grouped kernels take them, and
saves them as they were stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_paged_kernels import fused
from hf_paged_kernels.quantized import QuantizedWeight, cat, stack, why_not_joined, why_not_stacked, with_block

from ..base.errors import InvalidArgument
from .linear import QuantLinear
from .packed import Packed, product


@dataclass(frozen=True)
class Gating:
    """What lies between the projections of an expert.

    Attributes:
        first: what a checkpoint calls the projections of the input, whose results side by side are [S, N]: mostly the
            gate's, then the other one.
        last: what it calls the projection back.
        apply: differentiable, from [S, N] to what the last one takes, [S, I].
        kernel: the name of the activation with which `fused.moe_experts` does the same; None if it does not.
    """

    first: tuple[str, ...]
    last: str
    apply: Callable[[Tensor], Tensor]
    kernel: str | None = None


class ExpertLayers(nn.ModuleList):
    """Experts as `QuantLinear`s under the checkpoint's names: `0.gate_proj`, `0.up_proj`, `0.down_proj`, `1.gate_proj`, ...

    Those that cannot be stacked stay so and run one after the other.

    Attributes:
        reason: why they cannot be stacked; None if they can or it has not been tried.
    """

    def __init__(self, experts: list[dict[str, QuantLinear]], gating: Gating):
        super().__init__(nn.ModuleDict(layers) for layers in experts)
        self.num_experts, self.gating = len(experts), gating
        self.reason: str | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""

        def run(expert: int, x: Tensor) -> Tensor:
            layers = self[expert]
            first = torch.cat([layers[name](x) for name in self.gating.first], -1)
            return layers[self.gating.last](self.gating.apply(first))

        return one_by_one(hidden_states, top_k_index, top_k_weights, run)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The weights [E, N, H] and [E, H, I]."""
        sides = (self.gating.first, (self.gating.last,))
        return tuple(torch.stack([torch.cat([e[n].dequantize(dtype) for n in side]) for e in self]) for side in sides)

    def stacked(self) -> QuantExperts | ExpertLayers:
        """What runs them at once, if it can hold them; this module is used up. Its layers must be packed."""
        self.reason = self._why_not_stacked()
        return self if self.reason else QuantExperts(self)

    def _why_not_stacked(self) -> str | None:
        for names in (self.gating.first, (self.gating.last,)):
            for name in names:
                layers = [expert[name] for expert in self]
                if len({layer.bias is None for layer in layers}) > 1:
                    return f"only some {name} have a bias"
                if reason := why_not_stacked([layer.quantized for layer in layers]):
                    return f"of {name} {reason}"
            # what holds for one expert holds for all of one layout, but for the order of columns
            if reason := why_not_joined([self[0][name].quantized for name in names]):
                return f"{' and '.join(names)} cannot be joined: {reason}"
            if len({self[0][name].bias is None for name in names}) > 1:
                return f"only some of {' and '.join(names)} have a bias"
        return None


class StackedLayers(Packed):
    """Layers of one input of all experts: `quantized` is [E, N, K], `bias` None or [E, N].

    Takes them out of `experts`, one after the other.
    """

    def __init__(self, experts: ExpertLayers, names: tuple[str, ...]):
        super().__init__()
        self.names, layers = names, [experts[0][name] for name in names]
        self.formats = [layer.format for layer in layers]
        self.sizes = [layer.out_features for layer in layers]
        self._blocks = [layer.stored_weight.block for layer in layers]
        if layers[0].bias is not None:
            biases = [torch.cat([expert[name].bias for name in names]) for expert in experts]
            self._set("bias", torch.stack(biases))

        def take():
            for expert in experts:
                yield cat([expert.pop(name).quantized for name in names])

        self._adopt(stack(take(), len(experts)))

    @property
    def format(self):
        return self.formats[0]

    def expert(self, index: int, x: Tensor) -> Tensor:
        """What these layers of one expert make of x [S, K], differentiable in x."""
        y = product(x, self.quantized.expert(index), self.backend)
        return y if self.bias is None else y + self.bias[index]

    def stored(self, expert: int) -> dict[str, Tensor]:
        """The expert's tensors as a checkpoint has them, by name."""
        tensors = {}
        parts = self.quantized.expert(expert).split(self.sizes)
        for name, format, part, block in zip(self.names, self.formats, parts, self._blocks):
            unpacked = format.unpack(with_block(part, block))
            tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in unpacked.items()}
        if self.bias is not None:
            for name, bias in zip(self.names, self.bias[expert].split(self.sizes)):
                tensors[f"{name}.bias"] = bias.detach()
        return tensors

    def load(self, expert: int, tensors: dict[str, Tensor]) -> None:
        """Take an expert's tensors, as `stored` gives them. Raises InvalidArgument for those that are no such expert's."""
        weight, bias = self._packed(tensors)
        mine = self.quantized
        if weight.zeros is not None and mine.zeros is None:
            zeros = torch.full_like(mine.scales, mine.zero_point(), dtype=torch.int16)
            self._adopt(mine.with_tensors({"zeros": zeros}))
        mine = self.quantized.expert(expert)
        if reason := why_not_stacked([mine, weight]):
            raise InvalidArgument(f"{self.names[0]}: it has no place among the stacked experts: {reason}")
        with torch.no_grad():
            for name, tensor in mine.tensors().items():
                value = getattr(weight, name)
                tensor.copy_(value) if value is not None else tensor.fill_(weight.zero_point())
            if self.bias is not None:
                self.bias[expert] = bias

    def _packed(self, tensors: dict[str, Tensor]) -> tuple[QuantizedWeight, Tensor | None]:
        weights, biases, K = [], [], self.quantized.in_features
        for name, format, size in zip(self.names, self.formats, self.sizes):
            own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            bias = own.pop("bias", None)
            try:
                if (bias is None) != (self.bias is None):
                    raise InvalidArgument("bias is missing" if bias is None else "bias is not expected")
                format.check(own, size, K)
                weights.append(format.pack(own, size, K))
                biases.append(bias)
            except InvalidArgument as error:
                raise InvalidArgument(f"{name}.{error}") from error
        if reason := why_not_joined(weights):
            raise InvalidArgument(f"{' and '.join(self.names)} cannot be joined: {reason}")
        return cat(weights), None if self.bias is None else torch.cat(biases)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """The experts' module does."""

    def _load_from_state_dict(self, *args):
        """The experts' module does."""


class QuantExperts(nn.Module):
    """Experts with quantized weights, stacked: all that a batch needs run in two products.

    The weights are not trained; the gradients of the input and of the router's weights are those of the dequantized
    experts.

    Args:
        experts: packed layers that can be stacked; they are used up.
    """

    def __init__(self, experts: ExpertLayers):
        super().__init__()
        self.num_experts, self.gating = experts.num_experts, experts.gating
        self.first = StackedLayers(experts, self.gating.first)
        self.last = StackedLayers(experts, (self.gating.last,))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            run = lambda expert, x: self.last.expert(expert, self.gating.apply(self.first.expert(expert, x)))  # noqa: E731
            return one_by_one(hidden_states, top_k_index, top_k_weights, run)
        return self.run(hidden_states, top_k_index, top_k_weights, self.first.backend)

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, backend: str) -> Tensor:
        """The same on the kernels of `backend`, without gradients."""
        return fused.moe_experts(
            hidden_states, self.first.quantized, self.last.quantized, top_k_index, top_k_weights,
            activation=self.gating.kernel or self.gating.apply, gate_up_bias=self.first.bias, down_bias=self.last.bias,
            backend=backend,
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The weights [E, N, H] and [E, H, I]."""
        return self.first.quantized.dequantize(dtype), self.last.quantized.dequantize(dtype)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, {', '.join(self.gating.first)}, {self.gating.last}: {self.first.format}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for expert in range(self.num_experts):
            for layers in (self.first, self.last):
                for name, tensor in layers.stored(expert).items():
                    destination[f"{prefix}{expert}.{name}"] = tensor

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        for expert in range(self.num_experts):
            mine = f"{prefix}{expert}."
            tensors = {key.removeprefix(mine): tensor for key, tensor in state_dict.items() if key.startswith(mine)}
            if not tensors:  # a part of a model's state, such as its adapters
                missing += [f"{mine}{name}" for name in self.last.names] if strict else []
                continue
            try:
                for layers in (self.first, self.last):
                    layers.load(expert, tensors)
            except InvalidArgument as error:
                errors.append(f"{mine}{error}")


def one_by_one(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Sum over a token's experts e of its weight for e times run(e, the token), experts one after the other. [T, H]."""
    result = torch.zeros_like(x)
    for expert in top_k_index.unique().tolist():
        token, place = torch.where(top_k_index == expert)
        y = run(expert, x[token]) * top_k_weights[token, place, None]
        result = result.index_add(0, token, y.to(x.dtype))
    return result
