"""Steps scheduled while the one before them runs: the same outputs as one step at a time."""

from __future__ import annotations

import asyncio
import functools
import time

import pytest
import torch
from late_results import Recorder
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hf_paged
from hf_paged import AsyncEngine, DeadlineExceeded, Engine, EngineConfig, InvalidArgument, SamplingParams
from hf_paged.engine.request_state import RowHooks
from hf_paged.runtime.runner import StreamOrder

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return hf_paged.patch(tiny_model("qwen3", vocab_size=320))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(320)


def make_engine(model, tokenizer=None, overlap=True, **options):
    defaults = dict(block_size=16, max_batch_tokens=64, max_num_seqs=8)
    return Engine(model, tokenizer, EngineConfig(overlap=overlap, **{**defaults, **options}))


@pytest.fixture
def engine(model, tokenizer):
    with make_engine(model, tokenizer) as engine:
        yield engine
        assert not engine.has_unfinished() and not in_flight(engine)
        assert engine.stats()["kv_bytes_in_use"] == 0
        engine.check_integrity()


def prompts(count: int, length: int = 20, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (count, length), generator=generator).tolist()


def in_flight(engine) -> int:
    return len(engine._stepper._in_flight)


def drain(engine):
    while engine.has_unfinished():
        engine.step()
        assert in_flight(engine) <= 1
        engine.check_integrity()


@functools.cache
def twin():
    """The same model again, for engines without overlap."""
    return hf_paged.patch(tiny_model("qwen3", vocab_size=320))


def one_at_a_time(jobs, params):
    """What a synchronous engine says to each prompt alone."""
    params = params if isinstance(params, list) else [params] * len(jobs)
    with make_engine(twin(), tiny_tokenizer(320), overlap=False, prefix_cache=False) as engine:
        return [engine.generate([job], one)[0] for job, one in zip(jobs, params)]


def contents(output) -> list[tuple]:
    return [
        (c.token_ids, c.text, c.logprobs, c.cumulative_logprob, c.finish_reason, c.stop_reason) for c in output.outputs
    ]


def test_every_step_is_launched_before_the_last_one_is_read(engine):
    record = Recorder(engine)
    engine.generate(prompts(3), GREEDY)
    assert record.steps_ahead() == [1] * 11 + [0]  # nothing is left to launch after the last


def test_without_overlap_every_step_is_read_at_once(model):
    with make_engine(model, overlap=False) as engine:
        record = Recorder(engine)
        engine.generate(prompts(3), GREEDY)
        assert record.steps_ahead() == [0] * 12
    with Engine(model) as engine:  # the default of a CPU
        record = Recorder(engine)
        engine.generate(prompts(1), GREEDY)
        assert record.steps_ahead() == [0] * 12


def test_outputs_are_those_of_one_request_at_a_time_and_of_stock(engine):
    jobs = prompts(8)
    params = [
        GREEDY,
        SamplingParams(temperature=1.2, seed=5, max_tokens=15, ignore_eos=True, logprobs=3),
        SamplingParams(temperature=0.8, top_p=0.7, top_k=20, seed=6, max_tokens=12, ignore_eos=True, prompt_logprobs=2),
        SamplingParams(n=3, seed=8, max_tokens=9, ignore_eos=True, logprobs=0),
        SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=7, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=20, stop=["a", "e"], min_tokens=3, logit_bias={17: 4.0, 23: -50.0}),
        SamplingParams(temperature=1.0, min_p=0.1, max_tokens=30, stop_token_ids=list(range(3, 60)), seed=2),
        SamplingParams(temperature=0, max_tokens=1, bad_words=["b", "cd"]),
    ]
    expected = one_at_a_time(jobs, params)
    for output, alone in zip(engine.generate(jobs, params), expected):
        assert contents(output) == contents(alone)
        assert output.prompt_logprobs == alone.prompt_logprobs
    ids = torch.tensor(jobs[:1])
    stock = tiny_model("qwen3", vocab_size=320).generate(ids, max_new_tokens=12, do_sample=False)
    assert expected[0].outputs[0].token_ids == stock[0, 20:].tolist()


def test_a_step_returns_what_the_one_before_it_changed(engine):
    engine.add(prompts(1)[0], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    lengths = []
    while engine.has_unfinished():
        lengths.append([len(output.outputs[0].token_ids) for output in engine.step()])
    assert lengths == [[], [1], [2], [3]]


def test_a_prompt_in_chunks_overlaps_too(engine):
    jobs = prompts(2, length=200)
    record = Recorder(engine)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, prompt_logprobs=1)
    outputs = engine.generate(jobs, params)
    assert set(record.steps_ahead()[:-1]) == {1}
    for output, alone in zip(outputs, one_at_a_time(jobs, params)):
        assert contents(output) == contents(alone) and output.prompt_logprobs == alone.prompt_logprobs


def test_a_stop_nobody_foresaw_costs_one_row_and_changes_nothing(engine):
    jobs = prompts(2)
    free = one_at_a_time(jobs, GREEDY)
    stop = free[0].outputs[0].token_ids[4]
    expected = free[0].outputs[0].token_ids[: free[0].outputs[0].token_ids.index(stop) + 1]
    ends = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
    engine.reset_stats()
    outputs = engine.generate(jobs, [ends, GREEDY])
    assert outputs[0].outputs[0].token_ids == expected and outputs[0].outputs[0].stop_reason == stop
    assert outputs[1].outputs[0].token_ids == free[1].outputs[0].token_ids
    stats = engine.stats()
    assert stats["output_tokens"] == len(expected) + 12
    assert stats["tokens"] == 20 + len(expected) + 20 + 11  # the row of the stop token was computed: its only cost
    engine.reset_stats()
    alone = engine.generate(jobs[:1], ends)[0]
    assert alone.outputs[0].token_ids == expected
    assert engine.stats()["steps"] == len(expected)  # nobody waited for the last


def test_criteria_run_after_every_token_and_stop_in_time(engine):
    jobs = prompts(2)
    expected = one_at_a_time(jobs, GREEDY)
    seen = []

    def criterion(token_ids):
        seen.append(list(token_ids))
        return len(token_ids) >= 25

    record = Recorder(engine)
    state = engine.submit(jobs[0], GREEDY, hooks=RowHooks(criteria=(criterion,)))
    other = engine.submit(jobs[1], GREEDY)
    drain(engine)
    assert 1 in record.steps_ahead()
    assert state.output.outputs[0].token_ids == expected[0].outputs[0].token_ids[:5]
    assert seen == [jobs[0] + expected[0].outputs[0].token_ids[:count] for count in range(1, 6)]
    assert other.output.outputs[0].token_ids == expected[1].outputs[0].token_ids


WAITING = {
    "processors": (dict(logits_processors=[lambda ids, logits: logits - 0.01 * len(set(ids))]), {}),
    "forward hooks": (dict(forward_hooks={"model.layers.0": lambda activation, positions: None}), {}),
    "repetition penalty": ({}, dict(repetition_penalty=1.3)),
    "frequency penalty": ({}, dict(frequency_penalty=0.3)),
    "bad words": ({}, dict(bad_words=["ab"])),
}


@pytest.mark.parametrize("kind", WAITING)
def test_requests_whose_tokens_must_be_seen_make_their_steps_wait(engine, tokenizer, kind):
    options, params = WAITING[kind]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, **params)
    jobs = prompts(2)
    with make_engine(twin(), tokenizer, overlap=False) as plain:
        expected = plain.submit(jobs[0], params, hooks=_hooks(options))
        drain(plain)
    other = one_at_a_time(jobs[1:], GREEDY)[0]
    mate = engine.submit(jobs[1], GREEDY)
    engine.step()
    assert in_flight(engine) == 1
    state = engine.submit(jobs[0], params, hooks=_hooks(options))
    while not state.finished:
        engine.step()
        assert not in_flight(engine)
    drain(engine)
    assert state.output.error is None and contents(state.output) == contents(expected.output)
    assert contents(mate.output) == contents(other)


def _hooks(options) -> RowHooks:
    return RowHooks(
        processors=tuple(options.get("logits_processors", ())), forward_hooks=options.get("forward_hooks", {})
    )


def test_seen_hooks_replacements_and_torch_draws_are_stock_s(model):
    """Rows of `generate`, of which some draw from torch's generator or show every step."""
    ids = torch.tensor(prompts(1))
    stock = tiny_model("qwen3", vocab_size=320)
    with make_engine(model):
        for options in (dict(do_sample=True, top_k=30), dict(do_sample=False), dict(num_beams=3, do_sample=False)):
            torch.manual_seed(4)
            expected, after = stock.generate(ids, max_new_tokens=8, **options), torch.rand(1)
            torch.manual_seed(4)
            assert torch.equal(model.generate(ids, max_new_tokens=8, **options), expected)
            assert torch.equal(torch.rand(1), after)


def test_weights_changed_between_steps_reach_the_next_token(tokenizer):
    changing = tiny_model("qwen3", vocab_size=320)
    prompt = prompts(1)[0]
    with make_engine(changing, tokenizer) as engine:
        state = engine.submit(prompt, GREEDY)
        while len(state.output.outputs) == 0 or len(state.output.outputs[0].token_ids) < 5:
            engine.step()
        assert in_flight(engine) == 1
        with torch.no_grad():
            changing.get_output_embeddings().weight.copy_(changing.get_output_embeddings().weight.flip(0))
        drain(engine)
        tokens = state.output.outputs[0].token_ids
        rest = engine.generate([prompt + tokens[:5]], GREEDY)[0].outputs[0].token_ids
        assert tokens[5:] == rest[:7]
        assert state.output.metrics.num_preemptions == 0


class _Counting(torch.nn.Embedding):
    """Embeddings that write a buffer in every forward."""

    def forward(self, ids):
        self.calls.add_(1)
        return super().forward(ids)


def test_a_model_that_changes_in_every_forward_still_gets_on():
    changing = tiny_model("qwen3", vocab_size=320)
    changing.model.embed_tokens.__class__ = _Counting
    changing.model.embed_tokens.register_buffer("calls", torch.zeros(1))
    jobs = prompts(2)
    with make_engine(changing) as engine:
        states = [engine.submit(job, GREEDY) for job in jobs]
        for _ in range(20):
            engine.step()
        assert not engine.has_unfinished()
    tokens = [state.output.outputs[0].token_ids for state in states]
    assert tokens == [output.outputs[0].token_ids for output in one_at_a_time(jobs, GREEDY)]


def test_a_hook_put_on_the_model_between_steps_sees_every_later_token(model, engine):
    state = engine.submit(prompts(1)[0], GREEDY)
    for _ in range(4):
        engine.step()
    assert in_flight(engine) == 1 and len(state.output.outputs[0].token_ids) == 3
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    try:
        engine.step()
        assert not in_flight(engine) and len(seen) == 1
        assert len(state.output.outputs[0].token_ids) == 4
        drain(engine)
        assert len(seen) == 9  # what was in flight was computed again, with all before it; then one by one
    finally:
        handle.remove()


@pytest.mark.parametrize("when", ["at once", "late"])
@pytest.mark.parametrize("others_stop", [False, True])
def test_a_step_that_fails_for_one_request_harms_no_other(engine, when, others_stop):
    jobs = prompts(5)
    params = GREEDY
    if others_stop:  # so that failing steps have rows of completions that have ended
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=list(range(3, 90)))
    expected = one_at_a_time(jobs, params)
    poisoned = one_at_a_time(jobs[2:3], GREEDY)[0].outputs[0].token_ids

    def fails(tokens):  # from the fifth token of the third request on
        return any(ids[:20] == jobs[2] and len(ids) >= 25 for ids in tokens.values())

    Recorder(engine, **{"at once": dict(fails_at_once=fails), "late": dict(fails_late=fails)}[when])
    states = [engine.submit(job, GREEDY if i == 2 else params) for i, job in enumerate(jobs)]
    drain(engine)
    for index, (state, output) in enumerate(zip(states, expected)):
        if index == 2:
            assert f"failed {when}" in str(state.output.error)
            tokens = state.output.outputs[0].token_ids
            assert len(tokens) >= 5 and tokens == poisoned[: len(tokens)]
        else:
            assert contents(state.output) == contents(output)


def test_a_step_that_fails_because_of_a_row_for_nothing_harms_nobody(engine):
    jobs = prompts(2)
    free = one_at_a_time(jobs, GREEDY)
    stop = free[0].outputs[0].token_ids[3]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
    count = free[0].outputs[0].token_ids.index(stop) + 1
    failures = []

    def fails(tokens):  # the step that would compute the stop token, which is unknown when it is launched
        failed = not failures and any(ids[:20] == jobs[0] and len(ids) == 19 + count for ids in tokens.values())
        failures.extend([True] * failed)
        return failed

    Recorder(engine, fails_at_once=fails)
    states = [engine.submit(jobs[0], params), engine.submit(jobs[1], GREEDY)]
    drain(engine)
    assert failures
    assert [state.output.error for state in states] == [None, None]
    assert states[0].output.outputs[0].token_ids == free[0].outputs[0].token_ids[:count]
    assert contents(states[1].output) == contents(free[1])


def test_steps_that_fail_only_when_large_still_finish_everyone(engine):
    jobs = prompts(6)
    expected = one_at_a_time(jobs, GREEDY)
    Recorder(engine, fails_late=lambda tokens: len(tokens) > 3)
    for output, alone in zip(engine.generate(jobs, GREEDY), expected):
        assert contents(output) == contents(alone)


@pytest.mark.parametrize("when", ["launch", "read"])
def test_an_interrupt_loses_no_token(engine, when):
    jobs = prompts(3)
    expected = one_at_a_time(jobs, GREEDY)
    left = [3]

    def interrupt(tokens):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    record = Recorder(engine, fails_at_once=interrupt if when == "launch" else None)
    states = [engine.submit(job, GREEDY) for job in jobs]
    if when == "read":
        engine.step()
        engine.step()
        engine._stepper._in_flight[0].done = _Interrupting()
    with pytest.raises(KeyboardInterrupt):
        drain(engine)
    assert not in_flight(engine)
    engine.check_integrity()
    drain(engine)
    assert record.events
    assert [contents(state.output) for state in states] == [contents(output) for output in expected]


class _Interrupting:
    def wait(self):
        raise KeyboardInterrupt


def test_aborting_in_flight_frees_everything_at_once(engine):
    for steps in range(1, 8):
        names = [engine.add(job, SamplingParams(n=2, max_tokens=9, ignore_eos=True)) for job in prompts(3, length=50)]
        for _ in range(steps):
            engine.step()
        assert engine.abort(names[0]) and not engine.abort(names[0])
        engine.check_integrity()
        engine.step()
        for name in names[1:]:
            engine.abort(name)
        assert not engine.has_unfinished() and not in_flight(engine)
        assert engine.stats()["kv_bytes_in_use"] == 0
        engine.check_integrity()


def test_a_deadline_ends_a_request_in_flight(engine):
    jobs = prompts(2)
    expected = one_at_a_time(jobs, GREEDY)[1]
    late = engine.submit(jobs[0], SamplingParams(max_tokens=200, ignore_eos=True), deadline=0.02)
    other = engine.submit(jobs[1], GREEDY)
    engine.step()
    time.sleep(0.03)
    drain(engine)
    assert isinstance(late.output.error, DeadlineExceeded)
    assert contents(other.output) == contents(expected)


def test_closing_in_flight_ends_the_requests(model):
    engine = make_engine(model)
    state = engine.submit(prompts(1)[0], GREEDY)
    engine.step()
    assert in_flight(engine)
    engine.close()
    assert state.finished and state.output.error is not None and not in_flight(engine)


def test_preemption_with_tokens_on_their_way(model, tokenizer):
    jobs = prompts(7, length=60)
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=40, ignore_eos=True, logprobs=1)
    expected = one_at_a_time(jobs, params)
    with make_engine(model, tokenizer, kv_cache_memory=18 * 16 * 3 * 2 * 2 * 12 * 4) as engine:
        states = [engine.submit(job, params) for job in jobs]
        drain(engine)
        assert engine.stats()["preemptions"] > 0
        assert [contents(state.output) for state in states] == [contents(output) for output in expected]


def test_rows_driven_from_outside_between_steps_disturb_nobody(engine, model):
    jobs = prompts(4)
    expected = one_at_a_time(jobs, GREEDY)
    states = [engine.submit(job, GREEDY) for job in jobs]
    ids = torch.tensor(prompts(1, seed=9))
    stock = tiny_model("qwen3", vocab_size=320).generate(ids, max_new_tokens=6, num_beams=3, do_sample=False)
    for _ in range(3):
        engine.step()
    assert in_flight(engine)
    assert torch.equal(model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False), stock)
    drain(engine)
    assert [contents(state.output) for state in states] == [contents(output) for output in expected]


def test_a_prefix_computed_by_decoding_is_found_by_a_later_request(engine):
    prompt = prompts(1)[0]
    first = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))[0]
    history = prompt + first.outputs[0].token_ids
    again = engine.generate([history[:70]], GREEDY)[0]
    assert again.metrics.num_cached_tokens == 64
    assert contents(again) == contents(one_at_a_time([history[:70]], GREEDY)[0])


def test_speculation_waits_for_every_step(model, tokenizer):
    jobs = [[5, 6, 7, 8] * 5, *prompts(2)]
    expected = one_at_a_time(jobs, GREEDY)
    with make_engine(model, tokenizer, speculation="ngram") as engine:
        record = Recorder(engine)
        outputs = engine.generate(jobs, GREEDY)
        assert set(record.steps_ahead()) == {0}
    assert [contents(output) for output in outputs] == [contents(output) for output in expected]


def test_async_streams_end_with_the_same_tokens(model, tokenizer):
    jobs = prompts(5)
    expected = one_at_a_time(jobs, GREEDY)

    async def main():
        async with AsyncEngine(make_engine(model, tokenizer)) as engine:
            outputs = await asyncio.gather(*(engine.complete(job, GREEDY) for job in jobs))
            await asyncio.sleep(0.01)
            assert not engine.engine.has_unfinished() and not in_flight(engine.engine)
            return outputs

    outputs = asyncio.run(asyncio.wait_for(main(), 60))
    assert [contents(output) for output in outputs] == [contents(output) for output in expected]


def test_overlap_is_a_switch():
    with pytest.raises(InvalidArgument, match="overlap"):
        EngineConfig(overlap="yes")


class _Stream:
    """A CUDA stream that writes down whom it waits for."""

    def __init__(self):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


def test_callers_on_different_streams_take_turns(monkeypatch):
    first, second = _Stream(), _Stream()
    current = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    order = StreamOrder(torch.device("cuda"))
    for stream in (first, first, second, second, first):
        current.append(stream)
        order.follow(None)
    assert first.waited_for == [second] and second.waited_for == [first]
