"""An adapter's terms beside PEFT's own modules, on a few tokens, before anybody is served with it."""

from __future__ import annotations

import torch

from ...base.config import EngineConfig
from ...core.request import Request
from ...core.scheduler import Scheduler
from ...engine.build import build, build_runner
from ...runtime.adapters import groups_of
from ...runtime.batch import SequenceHooks
from ...runtime.runner import ModelRunner
from ..selfcheck import errors, scratch_config, small, some_tokens
from .bank import AS_IT_IS, AdapterBank, Loaded

LENGTHS = (5, 3, 1)  # of the sequences; the second has no adapter


def why_not_together(model, loaded: Loaded, config: EngineConfig) -> str | None:
    """Why requests with an adapter, which is in the bank, cannot run on its terms; None if they can.

    Three sequences in one batch, one of them without the adapter, must get the logits that they get on PEFT's modules,
    and every layer of the adapter's must have been called on the batch's rows.

    Args:
        model: a TransformersModel.
    """
    tokens = some_tokens(model.module, model.device, sum(LENGTHS))[0].tolist()
    try:
        mine, missed = _logits(model, loaded, config, tokens)
    except Exception as error:  # a layer was called with other rows than the batch's, or in a way of its own
        return f"the model cannot run with its terms: {str(error)[:200]}"
    if missed:
        return f"{missed[0]} does not run on the rows of a batch"
    reason, loaded.reason = loaded.reason, "checked"
    try:
        stock, _ = _logits(model, loaded, config, tokens)
    finally:
        loaded.reason = reason
    if not small(errors(mine, stock), model.dtype != torch.float32):
        return f"its terms give other logits than PEFT's modules (off by {errors(mine, stock).max():.1g} of the largest)"
    return None


def check_apart(model, loaded: Loaded, config: EngineConfig) -> None:
    """Raise what goes wrong when an adapter's requests run on PEFT's modules."""
    tokens = some_tokens(model.module, model.device, sum(LENGTHS))[0].tolist()
    _logits(model, loaded, config, tokens)


def _logits(model, loaded: Loaded, config, tokens: list[int]) -> tuple[torch.Tensor, list[str]]:
    """(logits of all rows of the sequences with the adapter, targets of its that nobody called)."""
    small_config = scratch_config(model, config, max_batch_tokens=len(tokens), max_num_seqs=len(LENGTHS))
    cache, scheduler = build(model, small_config, max_model_len=max(LENGTHS) + 1)
    runner = build_runner(model, small_config, cache, scheduler)
    start = 0
    for place, length in enumerate(LENGTHS):
        number = AS_IT_IS if place == 1 else loaded.number
        ids = tokens[start : start + length]
        scheduler.add(Request(request_id=str(place), prompt_token_ids=ids, max_tokens=1, adapter=number))
        start += length
    try:
        return _run(runner, scheduler, model.adapters, loaded)
    finally:
        runner.release()


def _run(runner: ModelRunner, scheduler: Scheduler, bank: AdapterBank, loaded: Loaded):
    plan = scheduler.schedule()
    rows = range(plan.num_tokens)
    with bank.noting():
        groups = groups_of(bank, plan)
        if len(groups) > 1:
            logits, _ = runner.forward_apart(plan, groups, None, SequenceHooks(), rows=rows)
        else:
            logits = runner.forward(runner.prepare(plan, rows=rows)).clone()
        missed = bank.uncalled(loaded)
        if loaded.reason is None:
            bank.note_unrecordable(loaded)
    mine = [
        row
        for number, count, first in zip(plan.adapters, plan.num_new, _starts(plan.num_new))
        for row in range(first, first + count)
        if number == loaded.number
    ]
    return logits[mine], missed


def _starts(counts: list[int]) -> list[int]:
    return [sum(counts[:place]) for place in range(len(counts))]
