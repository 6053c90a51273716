"""Layers that transformers' tensor-parallel plan has sharded, inside a step: the local part, and what goes around.

transformers replaces `forward` on each such module by one that converts to and from distributed tensors. Here that forward
is set aside and called outside of steps, so the model trains, saves and runs by itself as before. Inside a step:

- Linear layers split by columns ("colwise": each rank has some of the outputs) are linear layers of the local weight, and
  are merged and fused like any other.
- Those split by rows ("rowwise": each rank has some of the inputs) sum their products over the ranks, then add the bias.
- A head whose outputs are to be gathered gathers them, or leaves each rank its part, of which `SplitHead` finds the largest.
- Embeddings split by vocabulary look up what they have and sum.
- Experts run on their local parts and sum: parts of every expert, or whole experts of which each rank has some. The router
  runs on every rank.

Modules of any other style keep transformers' forward in a step, too.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_paged_kernels import fused
from hf_paged_kernels.quantized import QuantizedWeight

from ...parallel.team import Team
from ...quant.cuts import rounded_jointly
from ...quant.linear import QuantLinear
from ...runtime.batch import active_context
from ...runtime.warpers import row_argmax
from ..swap import SHARD, Swapped, reduce_plain
from ..weights import local, weight_of

COLUMNS = ("colwise",)
HEADS = ("colwise_gather_output", "colwise_rep")
ROWS = ("rowwise",)
ROUTER = "ep_router"
EXPERTS = ("moe_tp_experts", "ep_dispatch_experts")
WHOLE_EXPERTS = {ROUTER, "grouped_gemm", *EXPERTS}  # all that plans for experts alone are made of


@dataclass(eq=False)
class Shard:
    """What a sharded module has to know.

    Attributes:
        forward: transformers' own, for outside a step; None for a copy that runs the same everywhere.
        backend: of our kernels; None where they do not take the weight.
    """

    team: Team
    forward: Callable | None
    backend: str | None = None

    @property
    def runs(self) -> bool:
        """Whether the local form is the one to run now."""
        return self.forward is None or active_context() is not None

    def multiply(self, input: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
        if isinstance(weight, QuantizedWeight):
            return fused.linear(input, weight, bias, backend=self.backend or "auto")
        if self.backend is None:
            return nn.functional.linear(input, weight, bias)
        return fused.linear(input, weight, bias, backend=self.backend)


class Sharded:
    """Mixin of the classes below. Copies and pickles are of the class that transformers made, with its forward."""

    _hf_paged_base: type

    def __reduce_ex__(self, protocol):
        return reduce_plain(self)


class ColumnLinear(Sharded):
    def forward(self, input):
        shard = self.__dict__[SHARD]
        if not shard.runs:
            return shard.forward(input)
        return shard.multiply(input, weight_of(self), local(self.bias))


class HeadLinear(Sharded):
    def forward(self, input):
        shard = self.__dict__[SHARD]
        if not shard.runs:
            return shard.forward(input)
        logits = shard.multiply(input, weight_of(self), local(self.bias))
        context = active_context()
        return logits if getattr(context, "local_logits", False) else shard.head.gather(logits)


class RowLinear(Sharded):
    def forward(self, input):
        shard = self.__dict__[SHARD]
        if not shard.runs:
            return shard.forward(input)
        output = shard.team.all_reduce(self._part(shard, input))
        bias = local(self.bias)
        return output if bias is None else output + bias

    def _part(self, shard: Shard, input: Tensor) -> Tensor:
        if not isinstance(self, QuantLinear):
            return shard.multiply(input, local(self.weight), None)
        largest = lambda peaks: shard.team.all_gather(peaks, "scales").amax(0)  # noqa: E731
        return rounded_jointly(self, input, shard.backend or self.backend, largest)


class VocabEmbedding(Sharded):
    def forward(self, input):
        shard = self.__dict__[SHARD]
        if not shard.runs:
            return shard.forward(input)
        first, count = shard.rows
        mine = (input >= first) & (input < first + count)
        with local_parameters(self, padding_idx=None):
            output = super().forward((input - first).clamp(0, max(count, 1) - 1))
        return shard.team.all_reduce(output * mine[..., None], "embedding")


class PlainModule(Sharded):
    """A replicated module, whose own forward is all there is in a step: norms of local heads."""

    def forward(self, hidden_states):
        shard = self.__dict__[SHARD]
        return super().forward(hidden_states) if shard.runs else shard.forward(hidden_states)


class Router(Sharded):
    """In a step it names experts of all ranks, on all of them alike."""

    def forward(self, *args, **kwargs):
        shard = self.__dict__[SHARD]
        return super().forward(*args, **kwargs) if shard.runs else shard.forward(*args, **kwargs)


class SplitExperts(Sharded):
    """A part of every expert."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        shard = self.__dict__[SHARD]
        if not shard.runs:
            return shard.forward(hidden_states, top_k_index, top_k_weights)
        with local_parameters(self):
            output = super().forward(hidden_states, top_k_index, top_k_weights)
        return shard.team.all_reduce(output)


class WholeExperts(SplitExperts):
    """`num_experts` of the experts, in the order of the ranks. Those of others are number `num_experts`, and count nothing."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        shard = self.__dict__[SHARD]
        if shard.runs:
            top_k_index = top_k_index - shard.team.rank * self.num_experts
            away = top_k_index != top_k_index.clamp(0, self.num_experts - 1)
            top_k_index = top_k_index.masked_fill(away, self.num_experts)
            top_k_weights = top_k_weights.masked_fill(away, 0.0)
        return super().forward(hidden_states, top_k_index, top_k_weights)


@dataclass(eq=False)
class HeadShard(Shard):
    head: SplitHead | None = None


@dataclass(eq=False)
class VocabShard(Shard):
    rows: tuple[int, int] = (0, 0)  # first, count


class SplitHead:
    """An output embedding of which each rank has some rows.

    Args:
        sizes: rows of every rank, in order.
    """

    def __init__(self, team: Team, sizes: list[int]):
        self.team, self.sizes = team, sizes
        self.first = sum(sizes[: team.rank])

    def gather(self, logits: Tensor) -> Tensor:
        """[..., V] of every rank's local [..., V of its own]."""
        widest = max(self.sizes)
        padded = nn.functional.pad(logits, (0, widest - logits.shape[-1]))
        parts = self.team.all_gather(padded, "logits")
        return torch.cat([part[..., :size] for part, size in zip(parts, self.sizes)], dim=-1)

    def winners(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens int64 [R], largest logits [R]) of local logits [R, V of its own]: the first largest, as argmax."""
        found, peaks = row_argmax(logits)
        pairs = torch.stack([peaks.double(), (found + self.first).double()], dim=-1)
        pairs = self.team.all_gather(pairs, "winners")
        best = pairs[..., 0].argmax(0, keepdim=True)
        peaks, tokens = pairs.gather(0, best[..., None].expand(1, -1, 2))[0].unbind(-1)
        return tokens.long(), peaks.to(logits.dtype)


def parallel_plan(model: nn.Module) -> dict[str, str]:
    """Style of every module and weight that transformers has sharded, by its name with * for numbers of layers."""
    plan = dict(getattr(model, "tp_plan", None) or {})
    size = getattr(getattr(model.config, "distributed_config", None), "ep_size", None)  # 5.17 has none: one plan or the other
    if (size or 1) > 1:
        plan |= model.ep_plan
    return plan


def is_sharded(module: nn.Module) -> bool:
    """Whether a form of this file runs in place of the module's own."""
    return isinstance(module, Sharded)


@contextmanager
def local_parameters(module: nn.Module, **attributes):
    """While inside, `module`'s own parameters are their local parts, and these attributes are what is given."""
    kept = {name: parameter for name, parameter in module._parameters.items() if local(parameter) is not parameter}
    before = {name: getattr(module, name) for name in attributes if hasattr(module, name)}
    module._parameters.update({name: local(parameter) for name, parameter in kept.items()})
    for name in before:
        setattr(module, name, attributes[name])
    try:
        yield
    finally:
        module._parameters.update(kept)
        for name, value in before.items():
            setattr(module, name, value)


@functools.cache
def _class_of(mixin: type, plain: type) -> type:
    namespace = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (mixin, plain), {**namespace, "_hf_paged_base": plain})


def shard_modules(model: nn.Module, team: Team, backend: str) -> Callable[[], None]:
    """Put the local forms in place of transformers' forwards. Returns what takes that back."""
    changed: list[nn.Module] = []
    plan = parallel_plan(model)
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if not style or "forward" not in module.__dict__:
            continue
        made = _form(module, style, team, module.__dict__["forward"], backend)
        if made is not None:
            mixin, shard = made
            del module.__dict__["forward"]
            module.__class__ = _class_of(mixin, type(module))
            module.__dict__[SHARD] = shard
            changed.append(module)

    def undo() -> None:
        for module in changed:
            module.__class__ = module._hf_paged_base
            module.__dict__["forward"] = module.__dict__.pop(SHARD).forward

    return undo


def _form(module: nn.Module, style: str, team: Team, forward: Callable, backend: str) -> tuple[type, Shard] | None:
    """(mixin, what it needs to know) of a module's local form; None if there is none."""
    if style == "replicated_with_grad_allreduce" and len(inspect.signature(type(module).forward).parameters) == 2:
        return PlainModule, Shard(team, forward)
    if style == ROUTER:
        return Router, Shard(team, forward)
    if style in EXPERTS:
        weight = next(module.parameters())
        return WholeExperts if len(local(weight)) < len(weight) else SplitExperts, Shard(team, forward)
    if style == "embedding_rowwise" and isinstance(module, nn.Embedding) and module.max_norm is None:
        sizes = _rows(module, team)
        return VocabEmbedding, VocabShard(team, forward, rows=(sum(sizes[: team.rank]), sizes[team.rank]))
    if type(module) not in (nn.Linear, QuantLinear):
        return None
    weight = weight_of(module)
    known = backend if fused.supports_linear(weight, backend=backend) else None
    if style in COLUMNS:
        return ColumnLinear, Shard(team, forward, known)
    if style in ROWS:
        return RowLinear, Shard(team, forward, known)
    if style in HEADS:
        return HeadLinear, HeadShard(team, forward, known, head=SplitHead(team, _rows(module, team)))
    return None


def _rows(module: nn.Module, team: Team) -> list[int]:
    """How many rows of a weight each rank has."""
    return [row[0] for row in team.gather_numbers([weight_of(module).shape[0]])]


def split_head_of(model: nn.Module) -> SplitHead | None:
    """The output embedding, if each rank has some of its rows."""
    shard = model.get_output_embeddings().__dict__.get(SHARD) if model.get_output_embeddings() is not None else None
    return getattr(shard, "head", None)


def shard_copies(original: nn.Module, copied: nn.Module) -> None:
    """Give the parts of a copy the local forms of the original's, in a step and outside, on local parameters."""
    for mine, its in zip(original.modules(), copied.modules(), strict=True):
        shard = mine.__dict__.get(SHARD)
        if shard is None:
            continue
        its.__dict__.pop("forward", None)
        kind = next(base for base in type(mine).__mro__ if issubclass(base, Sharded) and not issubclass(base, Swapped))
        its.__class__ = kind
        its.__dict__[SHARD] = type(shard)(**{**vars(shard), "forward": None, "backend": None})
        for name, parameter in its._parameters.items():
            if parameter is not None:
                its._parameters[name] = nn.Parameter(local(parameter).detach().clone(), requires_grad=False)
