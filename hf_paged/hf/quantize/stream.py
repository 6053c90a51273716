"""Decoder layers one after another, each run on the inputs that calibration gives it.

Only the inputs of one layer are kept. They are what the layers before it, quantized by then, make of the calibration
sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...base.errors import UnsupportedModel
from ...quant.moments import Moments
from ..spec import decoder_layers


class _Enough(Exception):
    """Ends a forward whose rest is of no interest."""


class LayerStream:
    """The decoder layers of a model, in order, on calibration sequences.

    Args:
        model: in eval mode, not patched.
        sequences: token ids [S, L], S at least 2.

    Raises:
        UnsupportedModel: the model does more between its layers than hand on their outputs, or gives them other inputs
            that depend on the tokens.
    """

    def __init__(self, model: nn.Module, sequences: Tensor):
        self.model = model
        self.layers = decoder_layers(model)
        self.index = 0
        device = next(model.parameters()).device
        self._sequences = sequences.to(device)
        self._calls = self._record_calls()
        first = next(iter(self.layers.values()))
        self._hidden = [self._first_input(first, ids[None]) for ids in self._sequences]

    @property
    def name(self) -> str:
        return list(self.layers)[self.index]

    @property
    def layer(self) -> nn.Module:
        return self.layers[self.name]

    def hidden(self, place: int = 0) -> Tensor:
        """The layer's input [1, L, H] on the sequence at `place`."""
        return self._hidden[place]

    def run(self, place: int = 0) -> Tensor:
        """The layer's output [1, L, H] on the sequence at `place`."""
        return _hidden_of(self._call(self._hidden[place]))

    def advance(self) -> None:
        """Go on to the next layer, whose inputs are this one's outputs as it is now."""
        for place in range(len(self._hidden)):
            self._hidden[place] = self.run(place)
        self.index += 1

    def groups(self, linears: dict[str, nn.Module]) -> list[list[str]]:
        """Names of this layer's `linears`, those that share an input together, in the order in which they run.

        Layers that no sequence reached (experts nobody was sent to) come last, each for itself.
        """
        groups: dict[tuple, list[str]] = {}
        seen: set[str] = set()
        for hidden in self._hidden:
            inputs: list[Tensor] = []  # kept, so that none lies where another was

            def note(name: str, x: Tensor, inputs: list = inputs, hidden: Tensor = hidden) -> None:
                inputs.append(x)
                if name not in seen:
                    seen.add(name)
                    groups.setdefault((id(hidden), x.data_ptr(), x.shape), []).append(name)

            with _watching(linears, note):
                self._call(hidden)
            if len(seen) == len(linears):
                break
        return [*groups.values(), *([name] for name in linears if name not in seen)]

    def reaching(self, module: nn.Module) -> int | None:
        """The place of the first sequence on which the layer calls `module`."""

        def stop(name: str, x: Tensor) -> None:
            raise _Enough

        for place, hidden in enumerate(self._hidden):
            with _watching({"": module}, stop):
                try:
                    self._call(hidden)
                except _Enough:
                    return place
        return None

    def moments(self, heads: dict[str, nn.Module]) -> dict[str, Moments]:
        """Moments of the inputs of these layers over all sequences. Each forward ends when all of them were reached."""
        found = {name: Moments(_in_features(module), self._sequences.device) for name, module in heads.items()}
        for hidden in self._hidden:
            missing = set(heads)

            def note(name: str, x: Tensor, missing: set = missing) -> None:
                found[name].add(x)
                missing.discard(name)
                if not missing:
                    raise _Enough

            with _watching(heads, note):
                try:
                    self._call(hidden)
                except _Enough:
                    pass
        return found

    def _call(self, hidden: Tensor):
        args, kwargs = self._calls[self.index]
        with torch.no_grad():
            return self.layer(hidden, *args, **kwargs)

    def _first_input(self, first: nn.Module, ids: Tensor) -> Tensor:
        found = []

        def stop(module, args, kwargs):
            found.append(_split(args, kwargs)[0])
            raise _Enough

        handle = first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._forward(ids)
        except _Enough:
            return found[0].detach()
        finally:
            handle.remove()
        raise UnsupportedModel(f"model: {type(self.model).__name__} does not call its first decoder layer")

    def _forward(self, ids: Tensor) -> None:
        with torch.no_grad():
            self.model(input_ids=ids, use_cache=False)

    def _record_calls(self) -> list[tuple[tuple, dict]]:
        """What each layer is given besides its input, the same for all sequences of this length."""
        (calls, chain), (others, _) = (self._trace(ids[None]) for ids in self._sequences[:2])
        name = type(self.model).__name__
        if len(calls) != len(self.layers):
            raise UnsupportedModel(f"model: {name} does not call its {len(self.layers)} decoder layers once each")
        for layer, mine, other in zip(self.layers, calls, others):
            if differing := _difference(mine, other):
                raise UnsupportedModel(
                    f"model: {name} gives {layer} an input {differing} that depends on the tokens; it cannot be calibrated "
                    "layer by layer"
                )
        for layer, (output, following) in zip(list(self.layers)[1:], zip(chain[1::2], chain[2::2])):
            if output.shape != following.shape or not torch.equal(output, following):
                raise UnsupportedModel(
                    f"model: {name} changes what comes before {layer}; it cannot be calibrated layer by layer"
                )
        return calls

    def _trace(self, ids: Tensor) -> tuple[list[tuple[tuple, dict]], list[Tensor]]:
        """One whole forward: what every layer is given besides its input, and input, output, input, output, ..."""
        calls, chain = [], []

        def before(module, args, kwargs):
            hidden, args, kwargs = _split(args, kwargs)
            calls.append((args, kwargs))
            chain.append(hidden.detach().clone())

        def after(module, args, output):
            chain.append(_hidden_of(output).detach().clone())

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers.values()]
        handles += [layer.register_forward_hook(after) for layer in self.layers.values()]
        try:
            self._forward(ids)
        finally:
            for handle in handles:
                handle.remove()
        return calls, chain


def _split(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """(hidden states, the other arguments) of a decoder layer's call."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), (), kwargs


def _hidden_of(output) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _in_features(module: nn.Module) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]


@contextmanager
def _watching(modules: dict[str, nn.Module], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While inside, `note(name, input)` is called before each of `modules` runs."""

    def hook(name: str):
        return lambda module, args: note(name, args[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _difference(mine: tuple[tuple, dict], other: tuple[tuple, dict]) -> str | None:
    """The name of an argument that differs between two calls."""
    (args, kwargs), (others, other_kwargs) = mine, other
    if len(args) != len(others) or kwargs.keys() != other_kwargs.keys():
        return "list"
    for place, pair in enumerate(zip(args, others), 1):
        if not _same(*pair):
            return f"number {place}"
    return next((repr(name) for name, value in kwargs.items() if not _same(value, other_kwargs[name])), None)


def _same(mine, other) -> bool:
    if isinstance(mine, Tensor) and isinstance(other, Tensor):
        return mine.shape == other.shape and torch.equal(mine, other)
    if isinstance(mine, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(mine) == len(other) and all(map(_same, mine, other))
    if isinstance(mine, dict) and isinstance(other, dict):
        return mine.keys() == other.keys() and all(_same(value, other[key]) for key, value in mine.items())
    if mine is None or isinstance(mine, (bool, int, float, str)):
        return type(mine) is type(other) and mine == other
    return type(mine) is type(other)
