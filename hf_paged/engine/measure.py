"""How much of a GPU's memory is left for the KV cache: what the largest step needs is measured, not guessed."""

from __future__ import annotations

import torch

from ..base.errors import InvalidArgument
from ..base.sampling_params import SamplingParams
from ..core.plan import StepPlan
from ..runtime.graphs import GRAPH_BYTES, ladder
from ..runtime.memory import MemoryMeter
from ..runtime.runner import ModelRunner
from ..runtime.sampler import Sampler, SampleRow

_SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, top_k=50)  # what needs the most memory to sample


def kv_budget(
    runner: ModelRunner,
    meter: MemoryMeter,
    fraction: float,
    *,
    max_batch_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    graphs: bool,
) -> int:
    """Bytes that the KV cache may take of a device, of which `fraction` may be in use.

        fraction * total - in use without the cache - peak of the largest step - recorded forwards

    The largest step computes `max_batch_tokens` tokens and samples for `max_num_seqs` sequences. What graphs keep is the
    peak of a decode step, as they share their memory, and what the driver needs for each.

    Args:
        runner: one without recorded forwards, whose cache is empty; it is empty again afterwards.
        graphs: whether decode steps will be recorded.

    Raises InvalidArgument if the step itself does not fit.
    """
    lengths = []
    while (left := max_batch_tokens - sum(lengths)) > 0:
        lengths.append(min(left, max(1, max_model_len - 1)))
    try:
        peak = _peak(runner, meter, lengths, max_num_seqs)
        recorded = 0
        if graphs:
            recorded = _peak(runner, meter, [1] * max_num_seqs, max_num_seqs) + len(ladder(max_num_seqs)) * GRAPH_BYTES
    except torch.OutOfMemoryError as error:
        raise InvalidArgument(
            f"max_batch_tokens: there is no memory for a step of {max_batch_tokens} tokens beside the model; lower it"
        ) from error
    finally:
        runner.release()
    total, in_use = meter.total(), meter.in_use()
    budget = int(fraction * total) - in_use - peak - recorded
    if budget <= 0:
        raise InvalidArgument(
            f"kv_cache_memory: of {_gib(total)} nothing is left for the KV cache: {_gib(in_use)} are in use, a step of "
            f"{max_batch_tokens} tokens needs {_gib(peak)}, CUDA graphs {_gib(recorded)}, and {_gib((1 - fraction) * total)} "
            "are to stay free; lower max_batch_tokens or max_num_seqs, or raise kv_cache_memory"
        )
    return budget


def _peak(runner: ModelRunner, meter: MemoryMeter, lengths: list[int], num_sampled: int) -> int:
    """Bytes that a step of sequences of these lengths needs at most, beside cache and model."""
    plan = _plan(lengths, runner)
    rows = range(max(0, plan.num_tokens - num_sampled), plan.num_tokens)
    sample_rows = [SampleRow(params=_SAMPLED, token_ids=[0], num_prompt=1, seed=row) for row in rows]
    runner.reserve(plan.num_blocks, plan.num_slots)

    def step() -> None:
        logits = runner.forward(runner.prepare(plan, rows=rows))
        if runner.model.generates:
            Sampler().sample(logits, sample_rows)

    with runner.model.unobserved():
        return meter.peak(step)


def _plan(lengths: list[int], runner: ModelRunner) -> StepPlan:
    """New sequences of these lengths, each on blocks of its own."""
    cache, tables, count = runner.cache, [], 0
    for length in lengths:
        end = count + -(-length // cache.block_size)
        tables.append(list(range(count, end)))
        count = end
    num_groups, num_seqs = len(cache.groups), len(lengths)
    keeps_state = bool(cache.states.specs)
    return StepPlan(
        step=0,
        seq_ids=list(range(num_seqs)),
        num_new=lengths,
        num_drafts=[0] * num_seqs,
        num_context=[0] * num_seqs,
        token_ids=[0] * sum(lengths),
        block_tables=[tables] * num_groups,
        copies=[[] for _ in range(num_groups)],
        num_blocks=[count] * num_groups,
        states=[(-1, slot) for slot in range(num_seqs)] if keeps_state else [],
        num_slots=num_seqs if keeps_state else 0,
        samples=[],
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
