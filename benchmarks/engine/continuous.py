"""transformers' own continuous batching (`init_continuous_batching`, what `generate_batch` runs on) as a system."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence
from contextlib import contextmanager

import torch

from ..latency import Feed
from .systems import Progress, Run, eos_ids, kv_bytes_per_token
from .workload import Request

PAGE = 32  # tokens; smaller ones than by default, of which less is left empty
TOKENS_A_STEP = 512
PATIENCE = 120.0  # seconds without any token before a run counts as failed


class ContinuousFailed(RuntimeError):
    """It does not run this model, lost requests, or came to a standstill. The message is the reason."""


def run_continuous(
    model,
    requests: Sequence[Request],
    *,
    ignore_eos: bool = False,
    progress: Progress = lambda n: None,
    feed: Feed | None = None,
) -> Run:
    """Greedy, all requests at once or as `feed` brings them. A manager of its own, whose making is not timed.

    On a CPU, where by default it takes most of the machine's memory, its cache has room for all requests at their full
    length, and a step takes up to 512 tokens; on other devices it sizes itself.

    Raises ContinuousFailed.
    """
    feed = feed or Feed.at_once(len(requests))
    try:
        with _quiet(), torch.no_grad(), _manager(model, requests, ignore_eos) as manager:
            outputs = _run(manager, requests, feed, progress, eos=-1 if ignore_eos else list(eos_ids(model)) or -1)
            seconds = feed.now
    except ContinuousFailed:
        raise
    except Exception as error:  # whatever it does with a model it does not know
        raise ContinuousFailed(f"{type(error).__name__}: {error}") from error
    for index, output in enumerate(outputs):
        for moment in output.timestamps:
            feed.token(index, moment - feed.begun)
    kv = _kv_over_time(outputs, requests, kv_bytes_per_token(model) * PAGE, feed)
    return Run(
        [list(output.generated_tokens) for output in outputs], seconds, max(size for _, size in kv), kv, feed.answers
    )


def _manager(model, requests: Sequence[Request], ignore_eos: bool):
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    longest = max(request.max_new_tokens for request in requests)
    config = copy.deepcopy(model.generation_config)
    config.do_sample, config.max_new_tokens = False, longest
    if ignore_eos and (eos := eos_ids(model)):  # as with `min_new_tokens`, it cannot be chosen
        config.suppress_tokens = list(eos)
    own = {}
    if model.device.type == "cpu":
        pages = sum(-(-(len(request.prompt) + request.max_new_tokens) // PAGE) for request in requests)
        page = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # of transformers 5.17
        own = dict({page: PAGE}, num_blocks=pages + len(requests), max_batch_tokens=TOKENS_A_STEP)
    hints = WorkloadHints(
        max_prompt_length=max(len(request.prompt) for request in requests), max_generated_length=longest,
        num_requests=len(requests),
    )  # fmt: skip
    return model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**own), block=True, timeout=5,
        workload_hints=hints,
    )  # fmt: skip


def _run(manager, requests: Sequence[Request], feed: Feed, progress: Progress, eos) -> list:
    """Every request's output, in order."""
    outputs: dict[int, object] = {}
    places: dict[str, int] = {}
    heard = time.perf_counter()
    feed.start()
    while len(outputs) < len(requests):
        for index in feed.take(wait=len(places) == len(outputs)):
            own = dict(max_new_tokens=requests[index].max_new_tokens, eos_token_id=eos, record_timestamps=True)
            places[manager.add_request(list(requests[index].prompt), **own)] = index
        output = manager.get_result(timeout=min(0.5, feed.next_in))
        now = time.perf_counter()
        if output is None or not output.is_finished():
            if not manager.is_running() or now - heard > PATIENCE:
                cause = (
                    getattr(manager.background_thread_status, "fatal_error", None) or "its thread came to a standstill"
                )
                raise ContinuousFailed(f"{len(requests) - len(outputs)} requests were not done: {cause}")
            continue
        if output.error is not None:
            raise ContinuousFailed(f"a request failed: {output.error}")
        heard, index = now, places[output.request_id]
        outputs[index] = output
        feed.done(index)
        progress(len(output.generated_tokens))
    return [outputs[index] for index in range(len(requests))]


def _kv_over_time(
    outputs: Sequence, requests: Sequence[Request], page_bytes: int, feed: Feed
) -> list[tuple[float, int]]:
    """What requests hold, by their lengths in whole pages from when they were taken up until they ended."""
    events: list[tuple[float, int]] = []
    for output, request in zip(outputs, requests, strict=True):
        held = math.ceil(len(request.prompt) / PAGE)
        events.append((output.lifespan[0] - feed.begun, held))
        for place, moment in enumerate(output.timestamps, 1):
            more = math.ceil((len(request.prompt) + place) / PAGE) - held
            if more:
                events.append((moment - feed.begun, more))
                held += more
        events.append((output.lifespan[1] - feed.begun, -held))
    over_time, total = [(0.0, 0)], 0
    for moment, change in sorted(events):
        total += change
        over_time.append((moment, total * page_bytes))
    return over_time


@contextmanager
def _quiet():
    """Its log warns of settings it was given on purpose, and repeats errors that are raised here."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before, logger.level = logger.level, logging.CRITICAL
    try:
        yield
    finally:
        logger.setLevel(before)
