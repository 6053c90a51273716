"""Random traffic with overlapping steps: every output is, bit for bit, what the request gives alone.

Requests stop in all the ways there are, foreseen or not; some are aborted, some fail (a processor of theirs, a
criterion, every step they are in, at once or when its results are read), some make their steps wait, weights are
written, rows driven from outside come between, and blocks are short.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from late_results import Recorder
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hf_paged
from hf_paged import Engine, EngineConfig, RequestFailed, SamplingParams
from hf_paged.engine.request_state import RowHooks

VOCAB = 320
PREFIXES = [[], [7] * 20, list(range(30, 78)), list(range(30, 64))]
FAULTS = [None] * 6 + ["processor", "criterion", "launch", "result"]


@st.composite
def sampling(draw) -> SamplingParams:
    max_tokens = draw(st.integers(1, 16))
    return SamplingParams(
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        seed=draw(st.integers(0, 3)),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.4, 1.1])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        top_k=draw(st.sampled_from([0, 9])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.0, 0.4])),
        logit_bias=draw(st.sampled_from([None, {70: 3.0, 71: 2.5, 72: -9.0}])),
        bad_words=draw(st.sampled_from([None, None, None, ["a", "th"]])),
        stop=draw(st.sampled_from([None, ["e", "ab"], ["q"]])),
        stop_token_ids=draw(st.sampled_from([None, [75, 90, 200], list(range(3, 50))])),
        min_tokens=draw(st.integers(0, max_tokens)),
        max_tokens=max_tokens,
        logprobs=draw(st.sampled_from([None, 0, 3])),
        prompt_logprobs=draw(st.sampled_from([None, None, 1])),
    )


REQUESTS = st.fixed_dictionaries(
    dict(
        prefix=st.sampled_from(range(len(PREFIXES))),
        tail=st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=24),
        params=sampling(),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "salt"]),
        wait=st.integers(0, 3),
        abort_after=st.sampled_from([None, None, None, None, 0, 2, 5]),
        fault=st.sampled_from(FAULTS),
        fault_at=st.integers(1, 6),
        longest=st.sampled_from([None, None, 3]),
        between=st.sampled_from([None, None, "held", "weights"]),
    )
)


@functools.cache
def model(name: str):
    model = tiny_model(name, vocab_size=VOCAB)
    model.generation_config.eos_token_id = 2
    return hf_paged.patch(model)


def hooks_of(request: dict, prompt: tuple, faulty: bool) -> RowHooks:
    """What the request runs after its tokens, and, if `faulty`, where it fails."""
    at, criteria, processors = len(prompt) + request["fault_at"], [], ()
    if request["longest"] is not None:
        criteria.append(lambda ids: len(ids) >= len(prompt) + request["longest"])

    def fail(ids, *logits):
        if len(ids) >= at:
            raise ZeroDivisionError
        return logits[0] if logits else False

    if faulty and request["fault"] == "criterion":
        criteria.append(fail)
    if faulty and request["fault"] == "processor":
        processors = (fail,)
    return RowHooks(criteria=tuple(criteria), processors=processors)


def contents(output) -> list[tuple]:
    return [
        (c.token_ids, c.text, c.logprobs, c.cumulative_logprob, c.finish_reason, c.stop_reason) for c in output.outputs
    ]


def alone(name: str, jobs) -> list:
    """The requests one at a time, without faults, in a roomy engine without overlap and prefix cache."""
    config = EngineConfig(prefix_cache=False, block_size=16, overlap=False)
    outputs = []
    with Engine(model(name), tiny_tokenizer(VOCAB), config) as engine:
        for request, prompt in jobs:
            state = engine.submit(list(prompt), request["params"], hooks=hooks_of(request, prompt, faulty=False))
            while engine.has_unfinished():
                engine.step()
            outputs.append(state.output)
    return outputs


class Traffic:
    """The requests together on one engine, with all that happens to them."""

    def __init__(self, engine, jobs):
        self.engine = engine
        self.jobs = jobs
        self.results, self.aborts, self.steps = {}, {}, 0
        Recorder(engine, self._fails("launch"), self._fails("result"))

    def _fails(self, fault: str):
        """Whether a step computes, for a request with that fault, a token from `fault_at` on."""
        poisoned = {
            prompt: len(prompt) + request["fault_at"] for request, prompt in self.jobs if request["fault"] == fault
        }

        def fails(tokens) -> bool:
            return any(
                len(ids) >= length and tuple(ids[: len(prompt)]) == prompt and seq_id in self._of(prompt)
                for prompt, length in poisoned.items()
                for seq_id, ids in tokens.items()
            )

        return fails

    def _of(self, prompt: tuple) -> set[int]:
        requests = self.engine._scheduler.requests.values()
        return {seq.seq_id for r in requests if tuple(r.prompt_token_ids) == prompt for seq in r.sequences}

    def advance(self) -> None:
        self.engine.step()
        self.steps += 1
        for request_id in [request_id for request_id, at in self.aborts.items() if at <= self.steps]:
            self.engine.abort(request_id)
            del self.aborts[request_id]
        self.engine.check_integrity()

    def run(self, policy: str) -> None:
        for place, (request, prompt) in enumerate(self.jobs):
            self.engine.submit(
                list(prompt),
                request["params"],
                request_id=str(place),
                priority=request["priority"] if policy == "priority" else 0,
                user=f"user {request['priority']}" if policy == "fair" else None,
                cache_salt=request["salt"],
                hooks=hooks_of(request, prompt, faulty=True),
                on_output=lambda output: self.results.__setitem__(int(output.request_id), output),
            )
            if request["abort_after"] is not None:
                self.aborts[str(place)] = self.steps + request["abort_after"]
            for _ in range(request["wait"]):
                self.advance()
            self.between(request["between"])
        while self.engine.has_unfinished():
            self.advance()

    def between(self, what: str | None) -> None:
        if what == "weights":  # written, but with what they were
            weight = self.engine.model.module.get_output_embeddings().weight
            with torch.no_grad():
                weight.copy_(weight.clone())
        if what == "held":
            rows = self.engine.hold(2)
            rows.forward([[5, 6, 7], [9] * 20])
            rows.forward([[8], [9]])
            rows.close()


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral-window"])
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(REQUESTS, min_size=2, max_size=7),
    policy=st.sampled_from(["fcfs", "priority", "fair"]),
    budget=st.sampled_from([16, 40, 256]),
    seats=st.sampled_from([3, 5, 16]),
    memory_tokens=st.sampled_from([240, 400, 4000]),
)
def test_random_traffic_with_overlap_gives_the_same_outputs(name, requests, policy, budget, seats, memory_tokens):
    config = EngineConfig(
        block_size=16,
        max_batch_tokens=budget,
        max_num_seqs=seats,
        policy=policy,
        kv_cache_memory=memory_tokens * 3 * 2 * 2 * 12 * 4,
        overlap=True,
    )
    jobs = [(request, tuple(PREFIXES[request["prefix"]] + request["tail"])) for request in requests]
    expected = alone(name, jobs)
    with Engine(model(name), tiny_tokenizer(VOCAB), config) as engine:
        traffic = Traffic(engine, jobs)
        traffic.run(policy)
        assert engine.stats()["kv_bytes_in_use"] == 0 and not engine._stepper._in_flight
    poisoned = {prompt for request, prompt in jobs if request["fault"] in ("launch", "result")}
    for place, (output, (request, prompt)) in enumerate(zip(expected, jobs)):
        got = traffic.results[place]
        reasons = {completion.finish_reason for completion in got.outputs}
        if reasons & {"abort", "error"}:
            faulty = request["fault"] is not None or prompt in poisoned
            assert got.error is None or (faulty and isinstance(got.error, RequestFailed))
            for completion in got.outputs:
                tokens = completion.token_ids
                assert tokens == output.outputs[completion.index].token_ids[: len(tokens)]
        else:
            assert contents(got) == contents(output)
            assert got.prompt_logprobs == output.prompt_logprobs
