"""Layers that keep a state per sequence instead of keys and values: state spaces, linear attention, convolutions.

Their own code runs, on the live weights: inside a step a swapped mixer splits the packed rows by sequence, gives its own
forward a cache that holds the states of these sequences, and keeps what the forward leaves there. Outside a step it is
the mixer it was.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from ...base.errors import UnsupportedModel
from ...runtime.batch import active_context
from ...runtime.states import Advance, StateSpec
from ..swap import Swapped
from .base import PaddingFlaw

CACHE_PARAMETERS = ("cache", "cache_params", "past_key_values")  # what mixers call their cache, by version and family


@dataclass(frozen=True)
class Mixer:
    """State of a swapped mixer.

    Attributes:
        name: its path in the model.
        parameters: the names of its forward's parameters, in order.
        cache_parameter: the one that takes its cache.
    """

    name: str
    parameters: tuple[str, ...]
    cache_parameter: str


class PagedMixer(Swapped):
    """State: Mixer."""

    PADDING_FLAW: PaddingFlaw | None = None

    def forward(self, *args, **kwargs):
        own, context = super().forward, active_context()
        if context is None:
            return own(*args, **kwargs)
        mixer = self._hf_paged
        given = dict(zip(mixer.parameters, args)) | kwargs
        num_tokens = context.position_ids.shape[1]

        def advance(select, states):
            cache, contents = self._cache(states)
            arguments = {name: _select(value, select, num_tokens, mixer) for name, value in given.items()}
            return self._output(own(**{**arguments, mixer.cache_parameter: cache})), contents()

        return self._result(context.states.advance(mixer.name, advance))

    def _cache(self, states: list[torch.Tensor] | None) -> tuple[object, Callable[[], list[torch.Tensor]]]:
        """(a cache that holds `states`, what tells the states that the forward left in it)."""
        layer = _StateLayer(states)
        return Cache(layers=[layer] * (self.layer_idx + 1)), layer.states

    @staticmethod
    def _output(output):
        """What of the forward's result belongs to tokens."""
        return output

    @staticmethod
    def _result(output):
        """What the caller expects."""
        return output


class LightningMixer(PagedMixer):
    """MiniMax's lightning attention, whose cache is a list of its own, and which returns its state beside the output."""

    PADDING_FLAW = PaddingFlaw("transformers masks its padded rows wrongly in decoding, which pages do not imitate")

    def _cache(self, states):
        cache = _LinearCache(states)
        return cache, cache.states

    @staticmethod
    def _output(output):
        return output[0]

    @staticmethod
    def _result(output):
        return output, None


class _LinearCache:
    def __init__(self, states: list[torch.Tensor] | None):
        self._state = None if states is None else states[0]

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        return self._state

    def set_linear_cache(self, layer_idx: int, state: torch.Tensor) -> None:
        self._state = state

    def states(self) -> list[torch.Tensor]:
        return [self._state]


def _select(value, select, num_tokens: int, mixer: Mixer):
    """An argument of the packed batch, for the sequences that `select` picks."""
    if isinstance(value, torch.Tensor):
        if value.shape[:2] == (1, num_tokens):
            return select(value)
        raise UnsupportedModel(f"model: {mixer.name} takes a tensor {list(value.shape)}; whose rows it has is unknown")
    if isinstance(value, tuple):
        return tuple(_select(item, select, num_tokens, mixer) for item in value)
    return value


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


def mixer_class(module: nn.Module) -> type[PagedMixer] | None:
    """The mixin for a layer with a state: one with a causal convolution of its own, or a cache for linear attention."""
    if not hasattr(module, "layer_idx"):
        return None
    if type(module).__name__ == "MiniMaxLightningAttention":
        return LightningMixer
    return PagedMixer if any(isinstance(child, nn.Conv1d) for child in module.children()) else None


def describe_mixer(name: str, module: nn.Module) -> Mixer:
    parameters = tuple(inspect.signature(type(module).forward).parameters)[1:]
    cache_parameter = next((name for name in CACHE_PARAMETERS if name in parameters), None)
    if cache_parameter is None:
        raise UnsupportedModel(f"model: {name} has a convolution over tokens, but takes no cache for its state")
    return Mixer(name, parameters, cache_parameter)


class StateProbe:
    """Stands in for a step's states: runs every mixer on one sequence and records what its state looks like."""

    def __init__(self, model: nn.Module):
        self._modules = dict(model.named_modules())
        self.seen: list[StateSpec] = []

    def advance(self, name: str, advance: Advance):
        module = self._modules[name]
        if any(spec.name == name for spec in self.seen):
            raise UnsupportedModel(f"model: {name} runs twice in one forward")
        output, states = advance(_all, None)
        if not states:
            raise UnsupportedModel(f"model: {name} does not keep its state in the cache it is given")
        advance(lambda packed: packed[:, :1], [state.clone() for state in states])
        self.seen.append(
            StateSpec(
                layer_idx=module.layer_idx,
                name=name,
                kind=type(module).__name__,
                tensors=tuple((state.shape[1:], state.dtype) for state in states),
                takes_chunks=not _limits_prompts(module) and _takes_chunks(states, advance),
            )
        )
        return output


def _limits_prompts(module: nn.Module) -> bool:
    """Whether time steps are kept within limits where a prompt is computed, but not where it decodes."""
    return tuple(getattr(module, "time_step_limit", (0.0, math.inf))) != (0.0, math.inf)


def _all(packed: torch.Tensor) -> torch.Tensor:
    return packed


def _takes_chunks(states: list[torch.Tensor], advance: Advance) -> bool:
    """Whether several tokens at once go on from the state they are given. Some mixers then begin anew instead."""
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(state.shape, generator=generator).to(state) for state in states]
    first = _flat(advance(_all, [state.clone() for state in random])[0])
    for index in range(len(states)):
        changed = [state.zero_() if i == index else state for i, state in enumerate(s.clone() for s in random)]
        if torch.equal(_flat(advance(_all, changed)[0]), first):
            return False
    return True


def _flat(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output.flatten() if isinstance(output, torch.Tensor) else torch.cat([part.flatten() for part in output])
