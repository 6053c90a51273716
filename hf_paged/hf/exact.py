"""Exact mode: a token's logits are the same bits however they come about, in the engine and in `model(input_ids)`.

The kernels of the engine give a row of a batch bits of its own; nothing else of a forward may undo that, which is
checked when a model is patched (exact_check.py). A forward outside the engine, as a training loop calls it, runs on the same
kernels, packed, without padding, and with what its rows begin with in common computed once. It is differentiated as it
is; where that cannot be, the gradient is that of a second forward, the model's own, whose logits differ by rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..base.config import EngineConfig
from ..base.errors import InvalidArgument, RequestTooLarge, UnsupportedOption
from ..core.whole import WholeSequences
from ..engine.build import build_cache, max_batch_tokens
from ..runtime.runner import as_in_a_step
from ..runtime.whole import PassingCache, whole_context
from .spec import text_config
from .swap import are_own

_KNOWN = frozenset(
    {"input_ids", "attention_mask", "logits_to_keep", "labels", "num_items_in_batch", "use_cache", "return_dict"}
)
_OWN = frozenset({"output_hidden_states", "output_attentions", "output_router_logits"})  # what else an output holds

Spans = list[tuple[int, list[int]]]


class Forwards:
    """Forwards of a model over whole sequences, on pages of their own. Raises UnsupportedOption for a sharded one."""

    def __init__(self, adapter, config: EngineConfig):
        if adapter.team is not None:
            raise UnsupportedOption("a sharded model has no forwards beside its engine's")
        self._adapter = adapter
        self._cache = build_cache(adapter, config, PassingCache)
        self._budget = max_batch_tokens(adapter, config)
        self._longest = config.max_model_len or adapter.max_model_len

    def run(self, sequences: Sequence[list[int]], wanted: Sequence[int]) -> Iterator[tuple[Spans, Tensor]]:
        """Forwards over all `sequences`: one with autograd on, else several of as many tokens as a step has, or of one sequence.

        Args:
            wanted: of how many of each one's last tokens the logits are.

        Yields:
            (place of a sequence, the rows of `logits` of its wanted tokens) of every sequence in a forward, and its
            logits [R, V].

        Raises InvalidArgument for tokens that there are none of, RequestTooLarge for a sequence that is too long.
        """
        self._check(sequences)
        first, batch, together = 0, self._batch(), torch.is_grad_enabled()
        for index, tokens in enumerate(sequences):
            if batch.num_tokens and not together and batch.num_tokens + batch.cost(tokens) > self._budget:
                yield self._forward(batch, wanted[first:index], first)
                first, batch = index, self._batch()
            batch.add(tokens)
        yield self._forward(batch, wanted[first:], first)

    def _batch(self) -> WholeSequences:
        return WholeSequences(self._cache.block_size, stateful=bool(self._adapter.states))

    def _forward(self, batch: WholeSequences, wanted: Sequence[int], first: int) -> tuple[Spans, Tensor]:
        chosen = [rows[len(rows) - count :] for rows, count in zip(batch.rows, wanted)]
        rows = sorted(set().union(*chosen)) or [0]
        place = {row: index for index, row in enumerate(rows)}
        device = self._cache.device
        with _as_in_a_step(device):
            context = whole_context(batch, self._cache, first)
            logits = self._adapter.forward(context, torch.tensor(rows, device=device))
            context.shared.clear()
        return [(first + index, [place[row] for row in mine]) for index, mine in enumerate(chosen)], logits

    def _check(self, sequences: Sequence[list[int]]) -> None:
        vocab_size = self._adapter.vocab_size
        for row, tokens in enumerate(sequences):
            if not 0 <= min(tokens) <= max(tokens) < vocab_size:
                wrong = next(token for token in tokens if not 0 <= token < vocab_size)
                raise InvalidArgument(
                    f"input_ids has token id {wrong} in row {row}, outside the vocabulary of {vocab_size}"
                )
            if len(tokens) > self._longest:
                raise RequestTooLarge(f"row {row} has {len(tokens)} tokens, more than max_model_len ({self._longest})")


@contextmanager
def _as_in_a_step(device: torch.device):
    """As in a step, but with the caller's mode of autograd."""
    tracked = torch.is_grad_enabled()
    with as_in_a_step(device), torch.set_grad_enabled(tracked):
        yield


def takes(model, args: tuple, options: dict) -> bool:
    """Whether a call of the patched model is a forward over whole sequences, which exact mode answers."""
    given = args[0] if args else options.get("input_ids")
    no_cache = not any(options.get(name) is not None for name in ("past_key_values", "cache_params"))
    return not are_own() and model._hf_paged.exact and isinstance(given, Tensor) and given.dim() == 2 and no_cache


def exact_forward(model, forward, args: tuple, options: dict):
    """The output of `model(*args, **options)`, its logits those of the engine for the same tokens.

    Rows may have padding on both sides, whose logits are zeros. Their positions count from their first token. There is a
    cache in the output only if `use_cache=True` was given.

    Args:
        forward: the model's own; it runs for whatever else the output holds, and for gradients that need it.

    Raises UnsupportedOption for inputs that the engine would not see as it does, and dropout.
    """
    if len(args) > 1:
        raise UnsupportedOption("exact: give everything but input_ids by name")
    options = dict(options, input_ids=args[0]) if args else dict(options)
    input_ids, mask = options["input_ids"], options.get("attention_mask")
    for name, value in options.items():
        if name not in _KNOWN | _OWN and value is not None and value is not False:
            raise UnsupportedOption(f"exact: {name} is not supported by an exact forward; leave it out")
    if model.training and (name := _dropout(model)) is not None:
        raise UnsupportedOption(f"exact: {name} drops out in training mode, which no generated token saw; set it to 0")
    keep = options.get("logits_to_keep", 0)
    if not isinstance(keep, int) or keep < 0:
        raise UnsupportedOption("exact: logits_to_keep must be a number of positions")
    first, lengths = extents(input_ids, mask)
    labels, as_tuple = options.pop("labels", None), options.pop("return_dict", None) is False
    tracked = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())
    second = tracked and model._hf_paged.second_forward is not None
    asked = any(options.get(name, getattr(text_config(model), name, False)) for name in _OWN)
    output = CausalLMOutputWithPast()
    if second or asked or options.get("use_cache"):
        if any(first) and "position_ids" in inspect.signature(type(model).forward).parameters:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)  # a row's own, as in the engine and in `generate`
        with torch.set_grad_enabled(tracked and (second or asked)):
            output = forward(**{"use_cache": False, **options})
    with torch.set_grad_enabled(tracked and not second):
        logits = _padded_logits(model, input_ids, first, lengths, keep)
    output.logits = _WithGradientOf.apply(output.logits, logits) if second else logits
    if labels is not None:
        count = {"num_items_in_batch": options["num_items_in_batch"]} if "num_items_in_batch" in options else {}
        output.loss = model.loss_function(
            logits=output.logits, labels=labels, vocab_size=text_config(model).vocab_size, **count
        )
        if getattr(output, "aux_loss", None) is not None:
            output.loss = output.loss + model.router_aux_loss_coef * output.aux_loss.to(output.loss.device)
    return output.to_tuple() if as_tuple else output


def _padded_logits(model, input_ids: Tensor, first: list[int], lengths: list[int], keep: int) -> Tensor:
    """Logits [B, keep, V] of the last columns (0: all), zeros where there is padding."""
    batch, columns = input_ids.shape
    keep = min(keep, columns) or columns
    tokens = [row[begin : begin + length] for row, begin, length in zip(input_ids.tolist(), first, lengths)]
    ends = [begin + length - (columns - keep) for begin, length in zip(first, lengths)]
    wanted = [min(max(0, end), length) for end, length in zip(ends, lengths)]
    result = None
    with exact_forwards(model) as forwards:
        for spans, logits in forwards.run(tokens, wanted):
            sources = [place for _, places in spans for place in places]
            targets = [index * keep + column for index, places in spans
                       for column in range(ends[index] - len(places), ends[index])]  # fmt: skip
            if targets == list(range(batch * keep)) == sources:
                return logits.view(batch, keep, -1)
            if result is None:
                result = logits.new_zeros(batch * keep, logits.shape[1])
            if sources != list(range(len(logits))):
                logits = logits[torch.tensor(sources, device=logits.device)]
            result.index_copy_(0, torch.tensor(targets, device=logits.device), logits)
    return result.view(batch, keep, -1)


@contextmanager
def exact_forwards(model):
    """`Forwards` of a patched model as it is now. Its engine, if it has one, rests meanwhile."""
    patch = model._hf_paged
    engine = patch.live_engine
    with nullcontext() if engine is None else engine.between_steps():
        if engine is None:
            patch.adapter.weights_changed()
        yield Forwards(patch.adapter, patch.config_in_use)


class _WithGradientOf(torch.autograd.Function):
    """The values of one tensor with the gradient of another: two results of the same formula, one knows its gradient."""

    @staticmethod
    def forward(ctx, own: Tensor, values: Tensor) -> Tensor:
        return values.to(own.dtype, copy=True)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def extents(input_ids: Tensor, mask: Tensor | None) -> tuple[list[int], list[int]]:
    """Per row its first column that is no padding, and how many follow."""
    batch, columns = input_ids.shape
    if mask is None:
        return [0] * batch, [columns] * batch
    if mask.shape != input_ids.shape:
        raise InvalidArgument(f"attention_mask has shape {list(mask.shape)}, expected {list(input_ids.shape)}")
    seen = mask != 0
    lengths, first = seen.sum(-1).tolist(), seen.int().argmax(-1).tolist()
    for row, (begin, length) in enumerate(zip(first, lengths)):
        if not length or not bool(seen[row, begin : begin + length].all()):
            raise UnsupportedOption(f"attention_mask: row {row} must have ones side by side")
    return first, lengths


def _dropout(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p:
            return name
        if isinstance(getattr(module, "attention_dropout", None), float) and module.attention_dropout:
            return f"{name}.attention_dropout"
    return None

