"""Random traffic with guesses right and wrong: every output is, bit for bit, what the request gives without any."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import consult
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hf_paged
from hf_paged import Engine, EngineConfig, SamplingParams, Speculation

VOCAB = 320
PREFIXES = [[], [7] * 20, list(range(30, 78)), list(range(30, 64)), [70, 71, 72, 73] * 8]
MODELS = ["qwen3", "gemma2", "mistral-window"]


@st.composite
def sampling(draw) -> SamplingParams:
    temperature = draw(st.sampled_from([0.0, 0.0, 0.4, 1.1]))
    max_tokens = draw(st.integers(1, 16))
    return SamplingParams(
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        seed=draw(st.integers(0, 3)),
        temperature=temperature,
        top_p=draw(st.sampled_from([1.0, 0.8])),
        top_k=draw(st.sampled_from([0, 9])),
        min_p=draw(st.sampled_from([0.0, 0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4])),
        logit_bias=draw(st.sampled_from([None, {70: 3.0, 71: 2.5, 72: -9.0}])),
        allowed_token_ids=draw(st.sampled_from([None, None, range(60, 110)])),
        bad_words=draw(st.sampled_from([None, ["a", "th"]])),
        stop=draw(st.sampled_from([None, ["e", "ab"], ["q"]])),
        stop_token_ids=draw(st.sampled_from([None, [75, 90, 200]])),
        include_stop_str_in_output=draw(st.booleans()),
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
        abort_after=st.sampled_from([None, None, None, 0, 2, 5]),
    )
)


@functools.cache
def model(name: str):
    model = tiny_model(name, vocab_size=VOCAB)
    model.generation_config.eos_token_id = 2
    return hf_paged.patch(model)


@functools.cache
def noisy(name: str):
    """A draft model that agrees with the model now and then."""
    draft = tiny_model(name, vocab_size=VOCAB)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return draft


def contents(output) -> list[tuple]:
    return [
        (c.token_ids, c.text, c.logprobs, c.cumulative_logprob, c.finish_reason, c.stop_reason) for c in output.outputs
    ]


def alone(name: str, jobs) -> list:
    """The requests one at a time in a roomy engine without prefix cache and guesses."""
    with Engine(model(name), tiny_tokenizer(VOCAB), EngineConfig(prefix_cache=False, block_size=16)) as engine:
        return [engine.generate([list(prompt)], params)[0] for prompt, params in jobs]


def run(name, jobs, requests, config, expected, source) -> dict:
    """{place: output} of the requests together, some aborted on the way."""
    results, aborts, step = {}, {}, 0
    draft_model = noisy(name) if source == "draft" else None
    with Engine(model(name), tiny_tokenizer(VOCAB), config, draft_model=draft_model) as engine:
        if isinstance(source, float):
            consult(engine, expected, source)

        def advance():
            nonlocal step
            engine.step()
            step += 1
            for request_id in [request_id for request_id, at in aborts.items() if at <= step]:
                engine.abort(request_id)
                del aborts[request_id]
            engine.check_integrity()
            if draft_model:
                engine._draft_engine.check_integrity()

        for place, (request, (prompt, params)) in enumerate(zip(requests, jobs)):
            engine.add(
                list(prompt),
                params,
                request_id=str(place),
                priority=request["priority"] if config.policy == "priority" else 0,
                user=f"user {request['priority']}" if config.policy == "fair" else None,
                cache_salt=request["salt"],
                on_output=lambda output: results.__setitem__(int(output.request_id), output),
            )
            if request["abort_after"] is not None:
                aborts[str(place)] = step + request["abort_after"]
            for _ in range(request["wait"]):
                advance()
        while engine.has_unfinished():
            advance()
        assert engine.stats()["kv_bytes_in_use"] == 0
        assert not engine._speculator._paces
        assert not draft_model or engine._draft_engine.stats()["kv_bytes_in_use"] == 0
    return results


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(REQUESTS, min_size=2, max_size=7),
    policy=st.sampled_from(["fcfs", "priority", "fair"]),
    budget=st.sampled_from([16, 40, 256]),
    seats=st.sampled_from([3, 5, 16]),
    memory_tokens=st.sampled_from([240, 400, 4000]),
    most=st.sampled_from([1, 3, 7, 20]),
    source=st.sampled_from(["ngram", "draft", 0.3, 0.8, 1.0]),  # a number: the chance of the known token
)
def test_random_traffic_gives_the_same_outputs_with_any_guesses(
    name, requests, policy, budget, seats, memory_tokens, most, source
):
    config = EngineConfig(
        block_size=16,
        max_batch_tokens=budget,
        max_num_seqs=seats,
        policy=policy,
        kv_cache_memory=memory_tokens * 3 * 2 * 2 * 12 * 4,
        speculation=Speculation("draft" if source == "draft" else "ngram", num_tokens=most, ngram_range=(1, 4)),
    )
    jobs = [(tuple(PREFIXES[request["prefix"]] + request["tail"]), request["params"]) for request in requests]
    expected = alone(name, jobs)
    results = run(name, jobs, requests, config, expected, source)
    for place, output in enumerate(expected):
        got = results[place]
        if any(completion.finish_reason == "abort" for completion in got.outputs):
            for completion in got.outputs:
                assert completion.token_ids == output.outputs[completion.index].token_ids[: len(completion.token_ids)]
            continue
        assert contents(got) == contents(output)
        assert got.prompt_logprobs == output.prompt_logprobs
        assert got.metrics.num_accepted_tokens <= got.metrics.num_draft_tokens
