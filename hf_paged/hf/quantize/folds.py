"""Where the scales of an input can be folded: what produces it, found by trying.

A fold is proven, not looked up by name: channels are scaled by powers of two in the producer and back in the layers that
read them, and the decoder layer must give the same output, bit for bit. So every reader counts, also one nobody thought
of. (Where the producer multiplies by 1 + weight, its new weight is rounded; there the output must agree closely.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..spec import text_config
from .stream import LayerStream

# With 1 + weight: the largest difference of a row as a share of what the layer adds to it.
LIMIT = 1e-3
LIMIT_NARROW = 0.05


@dataclass(frozen=True)
class Fold:
    """Scales of the K channels of an input go into this producer.

    Attributes:
        producer: name inside the decoder layer.
        first: of the producer's output channels, the first that is meant.
        count: and their number; the input has each `repeat` times, in runs of `width`: channel (g, r, w) of the input is
            channel (g, w) of the producer. (Value heads that several query heads share.)
        offset: the producer is a norm that multiplies by weight + offset; None: it is a linear layer.
    """

    producer: str
    first: int
    count: int
    repeat: int = 1
    width: int = 1
    offset: int | None = None

    def shared(self, per_input: Tensor) -> Tensor:
        """Values [K] of the input's channels, each the mean of those that are one channel of the producer."""
        return self.spread(per_input.view(-1, self.repeat, self.width).mean(1).flatten())

    def spread(self, per_output: Tensor) -> Tensor:
        """[count] -> [K]"""
        groups = per_output.view(-1, 1, self.width)
        return groups.expand(-1, self.repeat, -1).flatten()

    def apply(self, layer: nn.Module, readers: list[nn.Module], scales: Tensor) -> None:
        """Divide the producer's channels by scales [K], which are `shared`, and multiply the readers' columns."""
        module = layer.get_submodule(self.producer)
        mine = scales.view(-1, self.repeat, self.width)[:, 0].flatten()
        rows = slice(self.first, self.first + self.count)
        weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
        part, offset = weight[rows].float(), self.offset or 0
        part = (part + offset) / (mine if part.dim() == 1 else mine[:, None]) - offset
        weight[rows] = part.to(weight.dtype)
        if getattr(module, "bias", None) is not None:
            module.bias.data[rows] = (module.bias.data[rows].float() / mine).to(module.bias.dtype)
        for reader in readers:
            weight = reader.weight.data.T if isinstance(reader, Conv1D) else reader.weight.data
            weight.copy_(weight.float() * scales)


class FoldFinder:
    """Folds of the layers of a stream. What a layer of the same structure had is tried first."""

    def __init__(self, stream: LayerStream):
        self.stream = stream
        self._known: dict[tuple[str, ...], Fold] = {}

    def find(self, linears: dict[str, nn.Module], groups: list[list[str]]) -> list[Fold | None]:
        """For each group of the layer's linear layers that share an input: where its scales go, None for nowhere."""
        prefix = self.stream.name + "."
        shared = _shared_parameters(self.stream.model)
        norms = self._norms_before(linears, groups)
        expected: dict[int, Tensor] = {}  # the layer's output, by sequence
        earlier: list[str] = []
        found = []
        for group in groups:
            key = tuple(name.removeprefix(prefix) for name in group)
            readers = [linears[name] for name in group]
            candidates = [self._known[key]] if key in self._known else []
            candidates += self._candidates(readers[0], norms.get(group[0]), earlier)
            place = self.stream.reaching(readers[0])  # on other sequences every fold would seem to hold
            if place is None:
                candidates = []
            elif place not in expected:
                expected[place] = self.stream.run(place)
            fold = next((each for each in candidates if self._holds(each, readers, shared, place, expected[place])), None)
            if fold is not None:
                self._known[key] = fold
            found.append(fold)
            earlier += key
        return found

    def _candidates(self, reader: nn.Module, norm: str | None, earlier: list[str]) -> Iterator[Fold]:
        K = reader.weight.shape[0] if isinstance(reader, Conv1D) else reader.in_features
        if norm is not None:
            yield Fold(norm, 0, K, width=K, offset=0)
            yield Fold(norm, 0, K, width=K, offset=1)
        config = text_config(self.stream.model)
        heads = getattr(config, "num_attention_heads", 1)
        repeats = dict.fromkeys((1, heads // (getattr(config, "num_key_value_heads", None) or heads)))
        for name in reversed(earlier):
            module = self.stream.layer.get_submodule(name)
            N = module.weight.shape[1] if isinstance(module, Conv1D) else module.out_features
            for repeat in repeats:
                count, width = K // repeat, K // heads if repeat > 1 else K
                if N >= count and count % width == 0:
                    yield from (Fold(name, first, count, repeat, width) for first in dict.fromkeys((N - count, 0)))

    def _holds(self, fold: Fold, readers: list[nn.Module], shared: set[int], place: int, expected: Tensor) -> bool:
        """Whether the layer's output on the sequence at `place`, `expected`, stays what it is."""
        producer = self.stream.layer.get_submodule(fold.producer)
        touched = [producer, *readers]
        parameters = [p for module in touched for p in module.parameters(recurse=False)]
        if any(id(parameter) in shared for parameter in parameters) or producer in readers:
            return False
        generator = torch.Generator().manual_seed(0)
        powers = torch.randint(-1, 2, (fold.count,), generator=generator).to(expected.device)
        with _restoring(parameters):
            fold.apply(self.stream.layer, readers, fold.spread(2.0**powers))
            actual = self.stream.run(place)
        if not fold.offset:
            return torch.equal(actual, expected)
        added = (expected - self.stream.hidden(place)).float().norm(dim=-1).clamp(min=1e-30)
        difference = (actual.float() - expected.float()).norm(dim=-1) / added
        return bool(difference.max() <= (LIMIT if expected.dtype == torch.float32 else LIMIT_NARROW))

    def _norms_before(self, linears: dict[str, nn.Module], groups: list[list[str]]) -> dict[str, str]:
        """First layer of a group -> the module, with a weight for each channel, whose output is its input."""
        produced: dict[tuple, str] = {}
        found: dict[str, str] = {}
        kept: list[Tensor] = []

        def after(name: str) -> Callable:
            def hook(module, args, output):
                if isinstance(output, Tensor):
                    kept.append(output)
                    produced[output.data_ptr(), output.shape] = name

            return hook

        def before(name: str) -> Callable:
            def hook(module, args):
                if (norm := produced.get((args[0].data_ptr(), args[0].shape))) is not None:
                    found[name] = norm

            return hook

        handles = [
            module.register_forward_hook(after(name))
            for name, module in self.stream.layer.named_modules()
            if getattr(module, "weight", None) is not None and module.weight.dim() == 1
        ]
        handles += [linears[group[0]].register_forward_pre_hook(before(group[0])) for group in groups]
        try:
            self.stream.run()
        finally:
            for handle in handles:
                handle.remove()
        return found


@contextmanager
def _restoring(parameters: list[nn.Parameter]) -> Iterator[None]:
    saved = [parameter.data.clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, values in zip(parameters, saved):
            parameter.data.copy_(values)


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that several modules have."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice
