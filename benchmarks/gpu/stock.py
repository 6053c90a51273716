"""Stock transformers on the workload: `generate` one at a time and in padded batches, and its continuous batching."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..engine.workload import Request
from .timing import synchronize

SHORT = 4  # tokens of the shorter of two runs from which a step's time is taken


@dataclass(frozen=True)
class StockRun:
    """What stock did. `extrapolated`: it ran fewer steps than the requests ask for, and the rest is their mean time."""

    output_tokens: int
    seconds: float
    requests: int
    steps_run: int
    extrapolated: bool
    attention: str  # transformers' name of the attention it ran

    @property
    def rate(self) -> float:
        """Output tokens per second; padding, and what a row makes beyond its own length, do not count."""
        return self.output_tokens / self.seconds

    def detail(self) -> dict:
        return {"requests": self.requests, "steps_run": self.steps_run, "extrapolated": self.extrapolated,
                "attention": self.attention}  # fmt: skip


def run_generate(model: torch.nn.Module, groups: Sequence[Sequence[Request]], max_steps: int) -> StockRun:
    """Greedy `generate` of one padded batch after another, each to its longest output.

    Of a batch with longer outputs than `max_steps` two shorter runs are timed, and the seconds of all its steps are
    those of the first run and the mean step from there on; later steps, on longer contexts, would be slower.
    """
    seconds, steps, extrapolated = 0.0, 0, False
    for group in groups:
        longest = max(request.max_new_tokens for request in group)
        if longest <= max(max_steps, SHORT + 1):
            seconds += _generate(model, group, longest)
            steps += longest
            continue
        first, second = _generate(model, group, SHORT), _generate(model, group, max_steps)
        seconds += first + (longest - SHORT) * (second - first) / (max_steps - SHORT)
        steps += max_steps
        extrapolated = True
    requests = [request for group in groups for request in group]
    made = sum(request.max_new_tokens for request in requests)
    return StockRun(made, seconds, len(requests), steps, extrapolated, model.config._attn_implementation)


def time_to_first_token(model: torch.nn.Module, group: Sequence[Request]) -> float:
    """Seconds until a padded batch has its first tokens, which come all at once."""
    return _generate(model, group, 1)


def _generate(model: torch.nn.Module, group: Sequence[Request], count: int) -> float:
    width = max(len(request.prompt) for request in group)
    rows = [[0] * (width - len(request.prompt)) + list(request.prompt) for request in group]
    mask = [[0] * (width - len(request.prompt)) + [1] * len(request.prompt) for request in group]
    ids, mask = (torch.tensor(part, device=model.device) for part in (rows, mask))
    synchronize(model.device)
    start = time.perf_counter()
    model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0
    )
    synchronize(model.device)
    return time.perf_counter() - start


class NotFinished(RuntimeError):
    """Continuous batching was not done with its requests in the time it was given, or lost some."""


def run_continuous(
    model: torch.nn.Module, requests: Sequence[Request], warm_up: Sequence[Request], limit: float
) -> StockRun:
    """transformers' continuous batching, greedy, all requests at once, each with its own length.

    Its own warm-up (memory, CUDA graphs) is not timed, nor are the requests `warm_up`. Raises NotFinished after `limit`
    seconds.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    longest = max(request.max_new_tokens for request in requests)
    config = GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=-1, pad_token_id=0)
    hints = WorkloadHints(
        max_prompt_length=max(len(request.prompt) for request in requests), max_generated_length=longest,
        num_requests=len(requests),
    )  # fmt: skip
    # By itself it takes most of the memory; on a CPU, where this is a dry run, that is everybody's.
    memory = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64) if model.device.type == "cpu" else None
    with torch.no_grad(), model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=memory, block=True, timeout=5, workload_hints=hints
    ) as manager:  # fmt: skip
        end = time.perf_counter() + limit
        _finish(manager, warm_up, end)
        start = time.perf_counter()
        made = _finish(manager, requests, end)
        seconds = time.perf_counter() - start
        attention = model.config._attn_implementation  # it takes FlashAttention where that is installed
    return StockRun(made, seconds, len(requests), made, False, attention)


def _finish(manager, requests: Sequence[Request], end: float) -> int:
    """Run requests to their end and return how many tokens they made."""
    made, left = 0, len(requests)
    for request in requests:
        manager.add_request(list(request.prompt), max_new_tokens=request.max_new_tokens)
    while left:
        if time.perf_counter() > end or not manager.is_running():
            raise NotFinished(f"{left} of {len(requests)} requests were not done in time")
        output = manager.get_result(timeout=0.5)
        if output is not None and output.is_finished():
            if output.error is not None:
                raise NotFinished(f"a request failed: {output.error}")
            made, left = made + len(output.generated_tokens), left - 1
    return made
