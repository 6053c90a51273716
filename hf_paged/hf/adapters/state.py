"""Layers that keep a state per sequence instead of keys and values: state spaces, linear attention, convolutions.

Their own code runs, on the live weights: inside a step a swapped mixer splits the packed rows by sequence, gives its own
forward a cache that holds the states of these sequences, and keeps what the forward leaves there. Outside a step it is
the mixer it was.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from ...base.errors import UnsupportedModel
from ...runtime.batch import active_context
from ...runtime.states import Advance, StateSpec
from ..swap import Swapped

CACHE_PARAMETERS = ("cache", "cache_params", "past_key_values")  # what mixers call their cache, by version and family


@dataclass(frozen=True)
class Mixer:
    """State of a swapped mixer: its path in the model, and what it calls its cache."""

    name: str
    cache_parameter: str


class PagedMixer(Swapped):
    """State: Mixer."""

    def forward(self, hidden_states, *args, **kwargs):
        own, context = super().forward, active_context()
        if context is None:
            return own(hidden_states, *args, **kwargs)
        mixer = self._hf_paged
        if args or any(isinstance(value, torch.Tensor) for value in kwargs.values()):
            raise UnsupportedModel(f"model: {mixer.name} takes more than hidden states; whose rows they are is unknown")

        def advance(hidden, states):
            layer = _StateLayer(states)
            kwargs[mixer.cache_parameter] = Cache(layers=[layer] * (self.layer_idx + 1))
            return own(hidden, **kwargs), layer.states()

        return context.states.advance(mixer.name, hidden_states, advance)


class _StateLayer(LinearAttentionLayer):
    """A mixer's cache for one call: states [S, ...] of the convolution and, if it has one, the recurrence."""

    def __init__(self, states: list[torch.Tensor] | None):
        super().__init__()
        if states is None:
            return
        self.has_previous_state[0] = True
        conv, recurrent = states if len(states) == 2 else (*states, None)
        self.dtype, self.device = conv.dtype, conv.device
        self.conv_states[0], self.conv_kernel_size[0], self.is_conv_states_initialized[0] = conv, conv.shape[-1], True
        self.recurrent_states[0], self.is_recurrent_states_initialized[0] = recurrent, recurrent is not None

    def states(self) -> list[torch.Tensor]:
        return [state for state in (self.conv_states[0], self.recurrent_states[0]) if state is not None]


def as_mixer(name: str, module: nn.Module) -> Mixer | None:
    """The Mixer of a layer with a state: one with a causal convolution of its own, and a place in a cache."""
    if not hasattr(module, "layer_idx") or not any(isinstance(child, nn.Conv1d) for child in module.children()):
        return None
    parameters = inspect.signature(type(module).forward).parameters
    cache_parameter = next((name for name in CACHE_PARAMETERS if name in parameters), None)
    return None if cache_parameter is None else Mixer(name, cache_parameter)


class StateProbe:
    """Stands in for a step's states: runs every mixer on one sequence and records what its state looks like."""

    def __init__(self, model: nn.Module):
        self._modules = dict(model.named_modules())
        self.seen: list[StateSpec] = []

    def advance(self, name: str, hidden: torch.Tensor, advance: Advance) -> torch.Tensor:
        module = self._modules[name]
        if any(spec.name == name for spec in self.seen):
            raise UnsupportedModel(f"model: {name} runs twice in one forward")
        output, states = advance(hidden, None)
        if not isinstance(output, torch.Tensor) or not states:
            raise UnsupportedModel(f"model: {name} does not keep its state in the cache it is given")
        advance(hidden[:, :1], [state.clone() for state in states])
        self.seen.append(
            StateSpec(
                layer_idx=module.layer_idx,
                name=name,
                kind=type(module).__name__,
                tensors=tuple((state.shape[1:], state.dtype) for state in states),
                takes_chunks=not _limits_prompts(module) and _takes_chunks(hidden, states, advance),
            )
        )
        return output


def _limits_prompts(module: nn.Module) -> bool:
    """Whether time steps are kept within limits where a prompt is computed, but not where it decodes."""
    return tuple(getattr(module, "time_step_limit", (0.0, math.inf))) != (0.0, math.inf)


def _takes_chunks(hidden: torch.Tensor, states: list[torch.Tensor], advance: Advance) -> bool:
    """Whether several tokens at once go on from the state they are given. Some mixers then begin anew instead."""
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(state.shape, generator=generator).to(state) for state in states]
    first, _ = advance(hidden, [state.clone() for state in random])
    for index in range(len(states)):
        changed = [state.zero_() if i == index else state for i, state in enumerate(s.clone() for s in random)]
        if torch.equal(advance(hidden, changed)[0], first):
            return False
    return True
