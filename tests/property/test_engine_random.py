"""Random traffic through a real engine: every output is what the request gives alone, and no block is lost."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from hf_paged import EmbedParams, Engine, EngineConfig, SamplingParams, ScoreOutput, ScoreParams

PREFIXES = [[], [7] * 20, list(range(30, 78)), list(range(30, 64))]

request_strategy = st.fixed_dictionaries(
    dict(
        prefix=st.sampled_from(range(len(PREFIXES))),
        tail=st.lists(st.integers(3, 198), min_size=1, max_size=24),
        task=st.sampled_from([None, None, None, "mean", "last", "cls", "score"]),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        max_tokens=st.integers(1, 14),
        temperature=st.sampled_from([0.0, 0.0, 1.1]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "salt"]),
        wait=st.integers(0, 3),
        abort_after=st.sampled_from([None, None, None, 0, 2, 5]),
    )
)


@functools.cache
def model(name: str):
    return tiny_model(name)


def params_of(request: dict) -> SamplingParams | EmbedParams | ScoreParams:
    if request["task"] == "score":
        return ScoreParams(continuation=[7, *request["tail"][::-1]])
    if request["task"] is not None:
        return EmbedParams(pooling=request["task"])
    return SamplingParams(
        n=request["n"],
        max_tokens=request["max_tokens"],
        temperature=request["temperature"],
        repetition_penalty=request["repetition_penalty"],
        seed=17,
        ignore_eos=True,
        detokenize=False,
    )


@functools.cache
def alone(name: str, prompt: tuple, params) -> list[list[int]] | list[float]:
    """The request by itself in a roomy engine, without a prefix cache."""
    with Engine(model(name), config=EngineConfig(prefix_cache=False, block_size=16)) as engine:
        (output,) = engine.generate([list(prompt)], params)
        if output.result is not None:
            return numbers(output.result)
        return [list(completion.token_ids) for completion in output.outputs]


def numbers(result) -> list[float]:
    return result.token_logprobs if isinstance(result, ScoreOutput) else result.embedding.tolist()


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral-window", "mamba2", "jamba", "lfm2"])
@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(request_strategy, min_size=2, max_size=9),
    policy=st.sampled_from(["fcfs", "priority", "fair"]),
    budget=st.sampled_from([16, 40, 256]),
    seats=st.sampled_from([3, 5, 16]),
    memory_tokens=st.sampled_from([240, 400, 4000]),
    overlap=st.booleans(),
)
def test_random_traffic(name, requests, policy, budget, seats, memory_tokens, overlap):
    layers = 3
    config = EngineConfig(
        block_size=16,
        max_batch_tokens=budget,
        max_num_seqs=seats,
        policy=policy,
        kv_cache_memory=memory_tokens * layers * 2 * 2 * 12 * 4,
        overlap=overlap,
    )
    results, aborts, step = {}, {}, 0
    jobs = {}
    with Engine(model(name), config=config) as engine:

        def advance():
            nonlocal step
            engine.step()
            step += 1
            for request_id in [request_id for request_id, at in aborts.items() if at <= step]:
                engine.abort(request_id)
                del aborts[request_id]
            engine.check_integrity()

        for request in requests:
            prompt = PREFIXES[request["prefix"]] + request["tail"]
            request_id = engine.add(
                prompt,
                params_of(request),
                priority=request["priority"] if policy == "priority" else 0,
                user=f"user {request['priority']}" if policy == "fair" else None,
                cache_salt=request["salt"],
                on_output=lambda output: results.__setitem__(output.request_id, output),
            )
            jobs[request_id] = (tuple(prompt), params_of(request))
            if request["abort_after"] is not None:
                aborts[request_id] = step + request["abort_after"]
            for _ in range(request["wait"]):
                advance()
        while engine.has_unfinished():
            advance()
        assert engine.stats()["kv_bytes_in_use"] == engine.stats()["state_bytes_in_use"] == 0

    for request_id, (prompt, params) in jobs.items():
        expected = alone(name, prompt, params)
        if not isinstance(params, SamplingParams):
            assert results[request_id].finished and results[request_id].error is None
            assert (results[request_id].result is None) == (results[request_id].outputs[0].finish_reason == "abort")
            if results[request_id].result is not None:
                assert numbers(results[request_id].result) == pytest.approx(expected, abs=1e-4)
            continue
        for completion in results[request_id].outputs:
            tokens = list(completion.token_ids)
            if completion.finish_reason == "abort":
                tokens_expected = expected[completion.index][: len(tokens)]
            else:
                assert completion.finish_reason == "length"
                tokens_expected = expected[completion.index]
            assert tokens == tokens_expected


def test_rows_have_the_same_bits_in_every_batch():
    """With the compiled kernels logits do not depend on batch mates, chunks or cached prefixes: not only the tokens."""
    from hf_paged_kernels.cpu import build

    if not build.available():
        pytest.skip(build.why_unavailable())
    generator = torch.Generator().manual_seed(1)
    jobs = [torch.randint(3, 199, (length,), generator=generator).tolist() for length in (5, 40, 64, 90, 17)]
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)

    def logprobs(outputs):
        return [[entry[token].logprob for token, entry in zip(c.token_ids, c.logprobs)] for o in outputs for c in o.outputs]

    with Engine(model("qwen3"), config=EngineConfig(block_size=16, prefix_cache=False)) as engine:
        one_by_one = logprobs([engine.generate([job], params)[0] for job in jobs])
    with Engine(model("qwen3"), config=EngineConfig(block_size=16, max_batch_tokens=23)) as engine:
        together = logprobs(engine.generate(jobs, params))
        cached = logprobs(engine.generate(jobs, params))
    assert one_by_one == together == cached
