"""`hf-paged quantize`: a loaded model becomes a quantized checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ...base.errors import InvalidArgument
from ...quant.gptq import Gptq
from ...quant.rounding import Scheme, round_to_fp8
from ..quantizers import mark_quantized
from ..spec import check_supported
from .calibrated import calibrate_awq, calibrate_gptq
from .calibration import perplexity
from .spot import round_layers
from .stored import Stored, as_awq, as_fp8, as_gptq
from .stream import LayerStream
from .targets import LARGEST_GROUP, MULTIPLE, MULTIPLE_OF_3_BITS, Targets, find_targets, group_size_for, summary

METHODS = ("gptq", "awq", "fp8")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to make of a model. None is a method's default; an option that a method does not have is refused.

    Attributes:
        method: "gptq", "awq" or "fp8" (rounds to nearest; nothing is calibrated).
        bits: 2, 3, 4 (the default) or 8; 4 for AWQ; 8 for fp8.
        group_size: input features that share a scale: -1 (all), or a power of two from 16 to 1024. Made smaller where it
            does not divide those of every layer. Default 128.
        symmetric: default True for GPTQ; False for AWQ, which has nothing else.
        act_order, static_groups, damping: see `quant.gptq.Gptq`.

    Raises:
        InvalidArgument: an option is unknown, impossible, or not one of the method's.
    """

    method: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: bool | None = None
    static_groups: bool | None = None
    damping: float | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise InvalidArgument(f"format must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method == "awq":
            if self.bits not in (None, 4):
                raise InvalidArgument(f"bits must be 4 for awq, got {self.bits!r}")
            if self.symmetric:
                raise InvalidArgument("sym: AWQ checkpoints have zero points; leave it out")
            self._refuse("act_order", "static_groups", "damping")
        if self.method == "fp8":
            if self.bits not in (None, 8):
                raise InvalidArgument(f"bits must be 8 for fp8, got {self.bits!r}")
            self._refuse("group_size", "symmetric", "act_order", "static_groups", "damping")
            return
        self.scheme(self.largest_group)
        self.gptq()
        if self.static_groups and self.act_order is False:
            raise InvalidArgument("static_groups: without act_order groups are neighbours anyway; leave it out")

    @property
    def largest_group(self) -> int:
        return LARGEST_GROUP if self.group_size is None else self.group_size

    def scheme(self, group_size: int) -> Scheme:
        is_gptq = self.method == "gptq"
        symmetric = is_gptq if self.symmetric is None else self.symmetric
        return Scheme(4 if self.bits is None else self.bits, group_size, symmetric, zero_from=int(is_gptq))

    def gptq(self) -> Gptq:
        options = {"act_order": self.act_order, "static_groups": self.static_groups, "damping": self.damping}
        return Gptq(**{name: value for name, value in options.items() if value is not None})

    def _refuse(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise InvalidArgument(f"{name}: {self.method} has no such option")


@dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
        scheme: how weights were rounded to integers; None for fp8.
        layers: number of linear layers that are quantized.
        kept: others -> why they are not, with a star for the number of the decoder layer.
        unscaled: of AWQ, linear layers whose inputs could not be scaled; their ranges alone were searched.
        perplexity: on the held-out sequences, before and after.
        num_bytes: of all parameters, before and after.
        seconds: for quantizing, without measuring.
    """

    scheme: Scheme | None
    layers: int
    kept: dict[str, str]
    unscaled: list[str]
    perplexity: tuple[float, float]
    num_bytes: tuple[int, int]
    seconds: float


def quantize_model(
    model: nn.Module, recipe: Recipe, sequences: Tensor, held_out: Tensor, *, progress: Callable[[str, int], Callable] | None = None
) -> Report:
    """Quantize a model in place: its linear layers are replaced, one decoder layer after another.

    Besides the model, this needs memory for the inputs of one decoder layer (the calibration sequences' hidden states)
    and, for each linear layer, the second moments of its inputs.

    Args:
        model: a loaded model in eval mode, not patched.
        sequences: token ids [S, L] to calibrate on, S at least 2.
        held_out: token ids [H, L] to measure perplexity on.
        progress: called with a word and a number of steps, returns what is called with a name after each step.

    Raises:
        InvalidArgument: the model is quantized already, has adapters or is in training mode; a layer's inputs are not
            finite.
        UnsupportedModel: the model has no linear layer to quantize, or cannot be run layer by layer.
    """
    check_supported(model)
    progress = progress or (lambda what, steps: lambda name: None)
    targets = find_targets(model, multiple=MULTIPLE_OF_3_BITS if recipe.bits == 3 else MULTIPLE)
    scheme, stored = _plan(recipe, targets)
    stream = None if recipe.method == "fp8" else LayerStream(model, sequences)
    before = perplexity(model, held_out, progress("perplexity before", len(held_out))), _num_bytes(model)
    start = time.perf_counter()
    layers, unscaled = _count(recipe, targets), []
    done = progress(recipe.method, layers)
    if recipe.method == "gptq":
        calibrate_gptq(model, stream, targets, scheme, recipe.gptq(), stored.format, done)
    elif recipe.method == "fp8":
        round_layers(model, targets, round_to_fp8, stored.format, done)
    else:
        unscaled = calibrate_awq(model, stream, targets, scheme, stored.format, done)
    seconds = time.perf_counter() - start
    mark_quantized(model, stored.config)
    after = perplexity(model, held_out, progress("perplexity after", len(held_out))), _num_bytes(model)
    return Report(scheme, layers, summary(targets.kept), unscaled, *zip(before, after), seconds)


def save(model: nn.Module, tokenizer, folder: Path) -> None:
    """The checkpoint, with its generation config and tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _plan(recipe: Recipe, targets: Targets) -> tuple[Scheme | None, Stored]:
    if recipe.method == "fp8":
        return None, as_fp8(list(targets.kept), targets.classes)
    most = recipe.largest_group
    scheme = recipe.scheme(-1 if most == -1 else group_size_for(targets, most))
    kept, quantized = list(targets.kept), [*targets.linears, *targets.experts]
    return scheme, as_gptq(scheme, kept, recipe.gptq()) if recipe.method == "gptq" else as_awq(scheme, kept, quantized)


def _count(recipe: Recipe, targets: Targets) -> int:
    """Number of steps: linear layers, and those of experts, which are rounded to nearest all at once."""
    layers = (1 if recipe.method == "fp8" else len(m.gate_up_proj) * sum(map(len, n)) for m, n in targets.experts.values())
    return len(targets.linears) + sum(layers)


def _num_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
