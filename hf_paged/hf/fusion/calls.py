"""Modules of a model as the model calls them, replayed one by one beside their fused forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_paged_kernels import ops

from ...runtime.batch import activate
from ..adapters import StateProbe
from ..attention import attention_configs, paged_attention
from ..swap import evaluating
from ..weights import float_parameter
from .proof import random_rows

FARTHEST = 2**20  # where a model without a limit is tried; scales that grow with the position have begun by then
BLOCK_SIZE = 16
TENSORS = ("position_embeddings", "position_ids")  # arguments that may be more than a flag


class Attended(NamedTuple):
    """What a module handed to attention: query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv] and the options."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict


@dataclass(frozen=True)
class Call:
    """How a model calls a module on hidden states, in a step.

    Attributes:
        positional: whether the hidden states [1, T, H] come first, without a name; everything else has one.
        arguments: the others. Those not in TENSORS are flags or None.
        size: H.
        dtype: of the hidden states.
    """

    positional: bool
    arguments: dict
    size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> Call | None:
        """None for a call with more to it than fused forms know of."""
        positional, arguments = len(args) == 1, dict(kwargs)
        x = args[0] if positional else arguments.pop("hidden_states", None)
        if len(args) > 1 or not isinstance(x, Tensor) or x.dim() != 3 or len(x) != 1:
            return None
        if not all(name in TENSORS or isinstance(value, bool | None) for name, value in arguments.items()):
            return None
        tables = arguments.get("position_embeddings")
        if not isinstance(tables, tuple) or [getattr(table, "ndim", None) for table in tables] != [3, 3]:
            return None
        return cls(positional, arguments, x.shape[2], x.dtype)

    def hidden_states(self, args: tuple, kwargs: dict) -> Tensor | None:
        """The hidden states among these arguments if they are the same call, on other tensors; else None."""
        if len(args) + len(kwargs) != 1 + len(self.arguments) or len(args) != self.positional:
            return None
        for name, value in self.arguments.items():
            if name not in kwargs or name not in TENSORS and kwargs[name] is not value:
                return None
        x = args[0] if args else kwargs.get("hidden_states")
        return x if x is not None and x.dtype is self.dtype and x.dim() == 3 and len(x) == 1 else None

    def replay(self, module: nn.Module, x: Tensor):
        """What the module's own forward makes of x [1, T, H]; the other arguments take x's dtype."""
        arguments = {name: _cast(value, x.dtype) for name, value in self.arguments.items()}
        return module.forward(x, **arguments) if self.positional else module.forward(hidden_states=x, **arguments)


def _cast(value, dtype: torch.dtype):
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class LayerProbe:
    """Stands in for a step: notes what attention is asked, and answers with the same random rows whatever it is.

    So what comes after attention in a layer is judged by itself, like what comes before.

    Attributes:
        attended: one entry per attention.
    """

    adapters = None

    def __init__(self, positions: Tensor, dtype: torch.dtype, backend: str, states: StateProbe | None = None):
        self.positions, self.position_ids = positions, positions[None]
        self.dtype, self.backend, self.states = dtype, backend, states
        self.shared: dict = {}
        self.attended: list[Attended] = []

    def attend(self, layer_idx, query, key, value, *, scale, softcap=None, sinks=None, alibi_slopes=None):
        options = dict(layer_idx=layer_idx, scale=scale, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes)
        self.attended.append(Attended(query, key, value, options))
        rows = random_rows(query.shape[1] * value.shape[2], query).to(self.dtype).to(query.dtype)
        rows = rows[torch.arange(len(query), device=rows.device) % len(rows)]
        return rows.view(-1, query.shape[1], value.shape[2])

    def attend_rotary(self, layer_idx, query, key, value, cos, sin, *, q_norm=None, k_norm=None, **options):
        """The kernels that a step runs, on a cache of its own."""
        slots = torch.arange(len(key), device=key.device)
        num_blocks = -(-len(key) // BLOCK_SIZE)
        sizes = (num_blocks, *key.shape[1:], value.shape[2], BLOCK_SIZE)
        k_cache, v_cache = ops.allocate_kv(*sizes, key.dtype, key.device, backend=self.backend)
        norms = dict(q_norm=q_norm, k_norm=k_norm)
        query = ops.rotary_store(query, key, value, k_cache, v_cache, slots, cos, sin, **norms, backend=self.backend)
        key, value = ops.gather_kv(k_cache, v_cache, slots[:num_blocks], len(slots))
        return self.attend(layer_idx, query, key, value, **options)


def spread_positions(limit: int, device: torch.device) -> Tensor:
    """As many positions as there are random rows, from the first to the last of `limit`."""
    last = min(limit, FARTHEST) - 1
    spots = torch.tensor([0, 1, min(2, last), last // 3, last // 2, last], device=device)
    return spots.clamp(max=last)


def calls_of(model: nn.Module, modules: list[nn.Module], limit: int, backend: str) -> dict[int, Call | None]:
    """How `model` calls `modules` in a step, by id; None for calls that fused forms do not know, or that differ.

    Args:
        limit: the most positions the model takes.
    """
    parameter = float_parameter(model)
    positions = spread_positions(limit, parameter.device)
    probe = LayerProbe(positions, parameter.dtype, backend, StateProbe(model))
    calls: dict[int, Call | None] = {}

    def note(module, args, kwargs):
        call = Call.of(args, kwargs)
        if id(module) in calls and call is not None:  # called again
            known = calls[id(module)]
            call = known if known is not None and known.hidden_states(args, kwargs) is not None else None
        calls[id(module)] = call

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        with evaluating(model), paged_attention(attention_configs(model)), activate(probe):
            model(input_ids=torch.zeros_like(probe.position_ids), position_ids=probe.position_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls
