"""Exact mode: a token's logits are the same bits however they come about, in the engine and in `model(input_ids)`.

The kernels of the engine give a row of a batch bits of its own; nothing else of a forward may undo that, which is
checked when a model is patched. A forward outside the engine, as a training loop calls it, takes its logits from pages,
too; their gradient is that of the model's own forward on the same inputs, whose logits differ by rounding only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..base.config import EngineConfig
from ..base.errors import InvalidArgument, UnsupportedModel, UnsupportedOption
from ..core.request import Request
from ..engine.build import build, build_runner
from .fusion.torch_ops import scope_torch_ops
from .selfcheck import Observed, scratch_config
from .spec import text_config
from .swap import are_own
from .weights import float_parameter

_DTYPES = (torch.float32, torch.bfloat16)
_KNOWN = frozenset({"input_ids", "attention_mask", "logits_to_keep", "labels", "use_cache", "return_dict"})
_OWN = frozenset({"output_hidden_states", "output_attentions", "output_router_logits", "num_items_in_batch"})
_BUDGETS = (5, 16)  # tokens of a step, for the check

# -- when a model is patched


def check_exact(adapter, observed: Observed, config: EngineConfig) -> None:
    """Raise UnsupportedModel unless the logits of a prompt have the same bits computed at once, alone, and in steps of
    various lengths beside others and token by token."""
    if adapter.team is not None:
        raise UnsupportedOption("exact: the sums of a sharded model's ranks depend on the batch")
    if adapter.dtype not in _DTYPES:
        raise UnsupportedOption(f"exact: float32 and bfloat16 are exact, not {adapter.dtype}")
    if not adapter.generates:
        raise UnsupportedOption(f"exact: {adapter.name} does not generate")
    if adapter.states:
        raise UnsupportedOption(f"exact: layers of {adapter.name} keep a state, which goes on from a prompt's chunks")
    tokens = observed.ids[0].tolist()
    adapter.torch_ops.noting = True
    whole = _logits(adapter, config, [tokens], len(tokens))[0]
    adapter.torch_ops.noting = False
    if adapter.torch_ops.others:
        raise UnsupportedModel(
            f"exact: {adapter.name} calls {', '.join(sorted(adapter.torch_ops.others))}, whose results depend on the batch"
        )
    adapter.runs_under_torch_ops = not scope_torch_ops(adapter.torch_ops, adapter.module, adapter.fusions)
    for budget in _BUDGETS:
        prompts = [tokens, tokens[: max(1, len(tokens) // 2)], tokens[: max(1, len(tokens) - 3)]]
        for mine in _logits(adapter, config, prompts, budget):
            if not torch.equal(mine, whole[: len(mine)]):
                raise UnsupportedModel(
                    f"exact: a token's logits of {adapter.name} depend on what is computed beside it"
                )


def _logits(adapter, config: EngineConfig, prompts: list[list[int]], budget: int) -> list[Tensor]:
    """Logits [L, V] of every position of every prompt, in steps of at most `budget` tokens together, their last tokens
    one by one."""
    longest = max(map(len, prompts))
    scratch = scratch_config(adapter, config, max_batch_tokens=max(budget, len(prompts)), max_num_seqs=len(prompts))
    scratch = scratch.replace(kv_cache_memory=scratch.kv_cache_memory * len(prompts), kv_dtype=config.kv_dtype)
    cache, scheduler = build(adapter, scratch, max_model_len=longest + 1)
    runner = build_runner(adapter, scratch, cache, scheduler)
    singles = 1 if budget >= longest or scheduler.whole_prompts else 3
    given = [tokens[: max(1, len(tokens) - singles + 1)] for tokens in prompts]
    for number, tokens in enumerate(given):
        left = len(prompts[number]) - len(tokens) + 1
        scheduler.add(Request(request_id=str(number), prompt_token_ids=tokens, max_tokens=left))
    parts: dict[int, list[Tensor]] = {}
    try:
        while (plan := scheduler.schedule()) is not None:
            logits = runner.forward(runner.prepare(plan, rows=range(plan.num_tokens)))
            ends = {}
            for seq_id, begin, mine in zip(plan.seq_ids, plan.num_context, logits.split(plan.num_new)):
                parts.setdefault(seq_id, []).append(mine.clone())
                ends[seq_id] = begin + len(mine)
            longer = prompts[0] + prompts[0]  # all of them begin alike
            scheduler.commit(plan, {seq_id: [longer[ends[seq_id]]] for _, seq_id in plan.samples})
    finally:
        runner.release()
    return [torch.cat(parts[seq_id]) for seq_id in sorted(parts)]


# -- a forward outside the engine


def takes(model, args: tuple, options: dict) -> bool:
    """Whether a call of the patched model is a forward over whole sequences, which exact mode answers."""
    given = args[0] if args else options.get("input_ids")
    no_cache = not any(options.get(name) is not None for name in ("past_key_values", "cache_params"))
    return not are_own() and model._hf_paged.exact and isinstance(given, Tensor) and given.dim() == 2 and no_cache


def exact_forward(model, forward, args: tuple, options: dict):
    """The output of `model(*args, **options)`, its logits those of the engine for the same tokens.

    Rows may have padding on both sides, whose logits are zeros. Their positions count from their first token.

    Args:
        forward: the model's own; it runs for the gradient of the logits, and for whatever else the output holds.

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
    first, lengths = extents(input_ids, mask)
    columns = input_ids.shape[1]
    keep = options.get("logits_to_keep", 0)
    if not isinstance(keep, int) or keep < 0:
        raise UnsupportedOption("exact: logits_to_keep must be a number of positions")
    keep = min(keep, columns) or columns
    labels = options.pop("labels", None)
    if any(first) and "position_ids" in inspect.signature(type(model).forward).parameters:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)  # a row's own, as in the engine and in `generate`
    output = forward(**options) if _needs_own(model, options) else CausalLMOutputWithPast()
    tokens = [row[begin : begin + length] for row, begin, length in zip(input_ids.tolist(), first, lengths)]
    wanted = [max(0, begin + length - (columns - keep)) for begin, length in zip(first, lengths)]
    wanted = [min(count, length) for count, length in zip(wanted, lengths)]
    rows = exact_logits(model, tokens, wanted)
    logits = rows[0].new_zeros(len(rows), keep, rows[0].shape[1])
    for row, begin, length, mine in zip(logits, first, lengths, rows):
        end = begin + length - (columns - keep)
        row[end - len(mine) : end] = mine
    if output.logits is not None:
        logits = with_gradient_of(output.logits, logits)
    output.logits = logits
    if labels is not None:
        count = {"num_items_in_batch": options["num_items_in_batch"]} if "num_items_in_batch" in options else {}
        output.loss = model.loss_function(
            logits=logits, labels=labels, vocab_size=text_config(model).vocab_size, **count
        )
    return output


def exact_logits(model, tokens: Sequence[list[int]], wanted: Sequence[int]) -> list[Tensor]:
    """Logits [wanted[i], V] of the last so many positions of sequences `tokens[i]`, without gradient."""
    engine = model._hf_paged.engine()
    results: list[list[Tensor]] = [[] for _ in tokens]
    for group in _groups([len(row) for row in tokens], engine._scheduler.max_batch_tokens):
        held = engine.hold(len(group), name="forward")
        try:
            skipped = []
            for place, index in enumerate(group):
                needed = tokens[index][: len(tokens[index]) - max(1, wanted[index]) + 1]
                skipped.append(held.take_hit(place, needed) if needed else 0)

            def execute(context, spans, group=group, skipped=skipped):
                packed, owners = [], []
                for span in spans:
                    index = group[span.row]
                    begin = skipped[span.row] + span.start
                    unwanted = min(span.count, max(0, len(tokens[index]) - wanted[index] - begin))
                    mine = span.packed[unwanted:]
                    packed += mine
                    owners.append((index, len(mine)))
                rows = torch.tensor(packed, dtype=torch.int64, device=context.position_ids.device)
                if not packed:  # a chunk of which nothing was asked: its keys and values were
                    rows = rows.new_zeros(1)
                logits = engine.model.forward(context, rows)
                offset = 0
                for index, count in owners:
                    results[index].append(logits[offset : offset + count].clone())
                    offset += count

            held.forward([tokens[index][skip:] for index, skip in zip(group, skipped)], execute)
        finally:
            held.close()
    like, size = float_parameter(model), engine.model.vocab_size
    return [torch.cat(parts) if parts else like.new_zeros(0, size).detach() for parts in results]


def _groups(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows that are held together: as many as the tokens of a step, so that their pages are few."""
    groups, room = [], 0
    for index, length in enumerate(lengths):
        if not groups or length > room:
            groups.append([])
            room = budget
        groups[-1].append(index)
        room -= length
    return groups


class _WithGradientOf(torch.autograd.Function):
    """The values of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx, own: Tensor, values: Tensor) -> Tensor:
        return values.to(own.dtype, copy=True)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def with_gradient_of(own: Tensor, values: Tensor) -> Tensor:
    """`values`, differentiated as `own` is: two results of the same formula, of which one knows its gradient."""
    return _WithGradientOf.apply(own, values) if own.requires_grad else values


def _needs_own(model, options: dict) -> bool:
    """Whether the model's own forward must run as well."""
    keeps = options.get("use_cache", getattr(text_config(model), "use_cache", False))
    gradient = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())
    asked = any(options.get(name) for name in _OWN - {"num_items_in_batch"})
    return gradient or bool(keeps) or asked


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

