"""Faster forwards for modules of a patched model, active only inside a step of the engine.

Only plain nn.Linear layers are merged or given another kernel unseen. Everything else is not chosen by a class's name
alone: it runs once beside the module's own forward on random inputs and is kept only if the results agree. Outside a
step, or when someone hooked a part that the fused form would bypass, the module's own forward runs.

- Linear and Conv1D: y = x W^T or x W by our kernel, on the live weight.
- Merged projections (q/k/v, gate/up): one weight holds all of them, the model's own parameters are views of it. The
  first projection called on an input computes all; its siblings, called on the same tensor, take their share.
- RMSNorm, gated MLP activation, rotary embedding: one kernel instead of five to twelve operations.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_paged_kernels import fused

from ..runtime.batch import active_context
from .swap import Swapped, can_swap, restore, swap
from .watch import is_hooked, version_of

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
ALIGNMENT = 64  # bytes
ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu"}


class Merged:
    """Several linear layers of one input as one weight [N, K]; the layers' parameters are views of it."""

    def __init__(self, layers: list[nn.Linear]):
        self.layers = layers
        self.sizes = [layer.out_features for layer in layers]
        self.weight = self._join([layer.weight for layer in layers])
        self.bias = None if layers[0].bias is None else self._join([layer.bias for layer in layers])

    def _join(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        merged = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, merged.split([p.shape[0] for p in parameters])):
            parameter.data = part
        return merged

    def intact(self) -> bool:
        """Whether every layer's parameters still are the views they were made."""
        return _follows(self.weight, [layer.weight for layer in self.layers]) and (
            self.bias is None or _follows(self.bias, [layer.bias for layer in self.layers])
        )

    def rejoin(self) -> None:
        """Merge again after something (an assigned parameter, `model.to`) took layers out of the storage."""
        self.weight = self._join([layer.weight for layer in self.layers])
        if self.bias is not None:
            self.bias = self._join([layer.bias for layer in self.layers])

    def separate(self) -> None:
        """Give every parameter its own storage back."""
        for layer in self.layers:
            layer.weight.data = layer.weight.data.clone()
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.clone()

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return fused.linear(x, self.weight, self.bias)


def _follows(merged: torch.Tensor, parameters) -> bool:
    pointer = merged.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != pointer:
            return False
        pointer += parameter.numel() * parameter.element_size()
    return True


class FusedLinear(Swapped):
    def forward(self, input):
        if active_context() is None:
            return super().forward(input)
        return fused.linear(input, self.weight, self.bias)


class FusedConv1D(Swapped):
    """GPT-2's linear layer, whose weight is kept [K, N]."""

    def forward(self, x):
        if active_context() is None or x.dim() != 3:
            return super().forward(x)
        return fused.head_linear(x, self.weight[None], self.bias)


class MergedLinear(Swapped):
    """State: (Merged, index). The step's context keeps the last merged result for the siblings that follow."""

    def forward(self, input):
        context = active_context()
        if context is None:
            return super().forward(input)
        merged, index = self._hf_paged
        kept = context.projections
        same = kept.get("input") is input and kept.get("merged") is merged
        if not same or kept["version"] != version_of(input):  # a hook may have changed the input in place
            kept["input"], kept["merged"], kept["version"] = input, merged, version_of(input)
            kept["parts"] = torch.split_with_sizes(merged.project(input), merged.sizes, dim=-1)
        return kept["parts"][index]


class FusedNorm(Swapped):
    """State: keyword arguments of `fused.rms_norm`."""

    def forward(self, hidden_states):
        same = hidden_states.dtype == self.weight.dtype and hidden_states.stride(-1) == 1
        if active_context() is None or not same:
            return super().forward(hidden_states)
        return fused.rms_norm(hidden_states, self.weight, **self._hf_paged)


@dataclass
class _MLP:
    activation: str
    merged: Merged | None
    bypassed: tuple[nn.Module, ...]  # modules whose own forward the fused form does not call

    def untouched(self, module) -> bool:
        parts = (
            (module.gate_proj, module.up_proj, _activation_module(module))
            if self.merged
            else (_activation_module(module),)
        )
        return all(now is then and not is_hooked(now) for now, then in zip(parts, self.bypassed))


class FusedMLP(Swapped):
    def forward(self, x):
        state = self._hf_paged
        if active_context() is None or not state.untouched(self):
            return super().forward(x)
        gate_up = state.merged.project(x) if state.merged else self.gate_up_proj(x)
        return self.down_proj(fused.act_and_mul(gate_up, state.activation))


def _activation_module(module) -> nn.Module | None:
    return getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)


@dataclass
class Fusions:
    """What was fused in one model, with reasons for what was not; `undo` takes it all back."""

    swapped: list[nn.Module] = field(default_factory=list)
    merged: list[Merged] = field(default_factory=list)
    rotary_modules: list = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    notes: dict[str, str] = field(default_factory=dict)

    def swap(self, module: nn.Module, mixin: type, state, kind: str) -> None:
        swap(module, mixin, state)
        self.swapped.append(module)
        self.counts[kind] += 1

    def stepping_aside(self) -> list[nn.Module]:
        """Fused modules whose own forward runs for now, because a part they would bypass was hooked or replaced."""
        return [
            module for module in self.swapped if isinstance(module, FusedMLP) and not module._hf_paged.untouched(module)
        ]

    def rejoin(self) -> None:
        for merged in self.merged:
            if not merged.intact():
                merged.rejoin()

    def undo(self) -> None:
        for module in self.swapped:
            restore(module)
        for merged in self.merged:
            merged.separate()
        for module in self.rotary_modules:
            _unwrap_rotary(module)
        self.swapped, self.merged, self.rotary_modules = [], [], []


def fuse(model: nn.Module) -> Fusions:
    """Fuse what is proven equal in `model`; what cannot be fused is left alone and noted."""
    fusions = Fusions()
    try:
        with torch.no_grad():
            _fuse_all(model, fusions)
    except BaseException:
        fusions.undo()
        raise
    return fusions


def _fuse_all(model: nn.Module, fusions: Fusions) -> None:
    reason = fused.why_unavailable(next(model.parameters()))
    tied = _tied_parameters(model)
    for module in list(model.modules()):
        merge_q = _merge(module, QKV, tied, fusions)
        merge_g = _merge(module, GATE_UP, tied, fusions)
        if reason is None:
            _fuse_mlp(module, merge_g, fusions)
        for kind, merged in (("qkv", merge_q), ("gate_up", merge_g)):
            if merged is not None:
                for index, layer in enumerate(merged.layers):
                    fusions.swap(layer, MergedLinear, (merged, index), kind)
    if reason is None:
        for module in model.modules():
            _fuse_linear(module, fusions)
            _fuse_norm(module, fusions)
        _fuse_rotary(model, fusions)
    else:
        fusions.notes["kernels"] = reason


def _tied_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that share storage with another one; those stay where they are."""
    owners: dict[int, int] = {}
    tied = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            other = owners.setdefault(parameter.data_ptr(), id(module))
            if other != id(module):
                tied.add(parameter.data_ptr())
    return tied


def _merge(module, names: tuple[str, ...], tied: set[int], fusions: Fusions) -> Merged | None:
    layers = [_inner_layer(getattr(module, name, None)) for name in names]
    if not all(type(layer) is nn.Linear and can_swap(layer) for layer in layers):
        return None
    first = layers[0]
    for layer in layers:
        same = (
            layer.in_features == first.in_features
            and layer.weight.dtype == first.weight.dtype
            and layer.weight.device == first.weight.device
            and (layer.bias is None) == (first.bias is None)
        )
        # a view begins where torch would allocate, or the layer's own forward might give other last bits
        aligned = layer.weight.numel() * layer.weight.element_size() % ALIGNMENT == 0
        if not same or not aligned or layer.weight.data_ptr() in tied or type(layer.weight) is not nn.Parameter:
            return None
    merged = Merged(layers)
    fusions.merged.append(merged)
    return merged


def _inner_layer(layer):
    """The linear layer that a PEFT adapter is wrapped around; any other layer itself."""
    return getattr(layer, "base_layer", layer)


def _fuse_linear(module, fusions: Fusions) -> None:
    if not (isinstance(module, nn.Linear | Conv1D) and can_swap(module) and fused.supports_linear(module.weight)):
        return
    if type(module) is Conv1D:
        fusions.swap(module, FusedConv1D, None, "linear")
    elif isinstance(module, nn.Linear):
        if type(module) is nn.Linear or _only_linear(module):
            fusions.swap(module, FusedLinear, None, "linear")


def _only_linear(module: nn.Linear) -> bool:
    """Whether a modeling file's subclass, such as Falcon's, computes just what nn.Linear does."""
    if not type(module).__module__.startswith("transformers.models."):
        return False
    x = _rows(module.in_features, module.weight)
    expected = module(x)
    return isinstance(expected, torch.Tensor) and _agree(
        fused.linear(x, module.weight, module.bias), expected, tolerance=1e-5
    )


def _fuse_norm(module, fusions: Fusions) -> None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        "RMSNorm" not in type(module).__name__
        or not can_swap(module)
        or not _takes_one_input(module)
        or not isinstance(weight, nn.Parameter)
        or weight.dim() != 1
        or not isinstance(eps, float)
    ):
        return
    x = _rows(weight.shape[0], weight)
    expected = module(x)
    for offset in (0.0, 1.0):
        for cast in ("weight_after", "weight_before"):
            options = {"eps": eps, "offset": offset, "cast": cast}
            if _agree(fused.rms_norm(x, weight, **options), expected):
                return fusions.swap(module, FusedNorm, options, "rms_norm")
    fusions.notes[type(module).__name__] = "its formula is not one of the RMSNorm kernel's"


def _fuse_mlp(module, merged: Merged | None, fusions: Fusions) -> None:
    activation = _activation_module(module)
    kind = ACTIVATIONS.get(type(activation).__name__)
    down = getattr(module, "down_proj", None)
    joined = getattr(module, "gate_up_proj", None)
    if kind is None or not isinstance(_inner_layer(down), nn.Linear) or not can_swap(module) or not _takes_one_input(module):
        return
    if merged is not None and merged.layers != [module.gate_proj, module.up_proj]:
        fusions.notes[type(module).__name__] = "an adapter is on its gate_proj or up_proj"
        return
    if merged is not None:
        state = _MLP(kind, merged, (module.gate_proj, module.up_proj, activation))
        first = module.gate_proj
    elif isinstance(joined, nn.Linear):
        state = _MLP(kind, None, (activation,))
        first = joined
    else:
        return
    x = _rows(first.in_features, first.weight)
    gate_up = state.merged.project(x) if merged is not None else joined(x)
    candidate = down(fused.act_and_mul(gate_up, kind))
    if _agree(candidate, module(x), tolerance=1e-4):
        fusions.swap(module, FusedMLP, state, "mlp")
    else:
        fusions.notes[type(module).__name__] = "its formula is not act(gate) * up"


def _takes_one_input(module) -> bool:
    """False for modules that compute more than our kernels know: gated norms, MLPs shared by several layers."""
    return len(inspect.signature(module.forward).parameters) == 1


def _rows(size: int, like: torch.Tensor) -> torch.Tensor:
    """Random rows of very different magnitude, so that a wrong epsilon or offset shows. Leaves torch's RNG alone."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(6, size, generator=generator) * torch.tensor([1e-4, 1e-2, 1.0, 1.0, 10.0, 100.0])[:, None]
    return rows.to(like)


def _agree(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> bool:
    """Equal up to rounding in fp32, to the last bit in narrower types."""
    if actual.shape != expected.shape:
        return False
    if expected.dtype != torch.float32:
        return torch.equal(actual, expected)
    scale = expected.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
    return bool(((actual - expected).abs() / scale).max() <= tolerance)


# Rotary embedding is a function of the modeling file, not a module: it is replaced there by a wrapper that outside a
# step is the function itself. Several patched models may share a file, so wrappers are counted.
_rotary_users: Counter = Counter()


def _fuse_rotary(model: nn.Module, fusions: Fusions) -> None:
    names = {type(module).__module__ for module in model.modules()}
    for name in sorted(names):
        file = sys.modules.get(name)
        function = getattr(file, "apply_rotary_pos_emb", None)
        if function is None or not name.startswith("transformers.models."):
            continue
        if hasattr(function, "_hf_paged_original") or _rotary_agrees(function):
            _wrap_rotary(file)
            fusions.rotary_modules.append(file)
            fusions.counts["rotary"] += 1
        else:
            fusions.notes[f"{name}.apply_rotary_pos_emb"] = "not the rotate-half form"


def _rotary_agrees(function) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 5, heads, 16, generator=generator).transpose(1, 2) for heads in (4, 2))
    angles = torch.randn(1, 5, 8, generator=generator)
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
    try:
        expected = function(q, k, cos, sin)
    except Exception:  # another signature: not the function we know
        return False
    return all(_agree(a, e) for a, e in zip(_rotary(q, k, cos, sin), expected))


def _rotary(q, k, cos, sin):
    """q [1, Hq, T, D], k [1, Hkv, T, D], cos and sin [1, T, R] as the attention modules pass them."""
    q_out, k_out = fused.rotary(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
    return q_out.transpose(0, 1)[None], k_out.transpose(0, 1)[None]


def _wrap_rotary(file) -> None:
    _rotary_users[file.__name__] += 1
    original = file.apply_rotary_pos_emb
    if hasattr(original, "_hf_paged_original"):
        return

    def apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs):
        ours = active_context() is not None and not args and not kwargs and fused.supports_rotary(q, k, cos, sin)
        return _rotary(q, k, cos, sin) if ours else original(q, k, cos, sin, *args, **kwargs)

    apply_rotary_pos_emb._hf_paged_original = original
    file.apply_rotary_pos_emb = apply_rotary_pos_emb


def _unwrap_rotary(file) -> None:
    _rotary_users[file.__name__] -= 1
    if _rotary_users[file.__name__] == 0:
        file.apply_rotary_pos_emb = file.apply_rotary_pos_emb._hf_paged_original
