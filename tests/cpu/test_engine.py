"""The engine's own interface: parameters per request, faults that stay local, nothing left behind."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hf_paged
from hf_paged import (
    AsyncEngine,
    DeadlineExceeded,
    Engine,
    EngineClosed,
    EngineConfig,
    InvalidArgument,
    QueueFull,
    RequestFailed,
    RequestTooLarge,
    SamplingParams,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", vocab_size=320)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(320)


@pytest.fixture(params=[False, True], ids=["one-at-a-time", "overlap"])
def engine(model, tokenizer, request):
    config = EngineConfig(block_size=16, max_batch_tokens=64, max_num_seqs=8, overlap=request.param)
    with Engine(model, tokenizer, config) as engine:
        yield engine
        assert not engine.has_unfinished()
        assert engine.stats()["kv_bytes_in_use"] == 0
        engine.check_integrity()


def prompts(count: int, length: int = 20, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (count, length), generator=generator).tolist()


def alone(engine, prompt, params=GREEDY) -> list[int]:
    return engine.generate([prompt], params)[0].outputs[0].token_ids


def drain(engine):
    while engine.has_unfinished():
        engine.step()


def test_outputs_do_not_depend_on_batch_mates(engine):
    jobs = prompts(6)
    mixed = [
        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
        SamplingParams(temperature=1.2, seed=5, max_tokens=15, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.7, top_k=20, seed=6, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=7, ignore_eos=True),
        SamplingParams(temperature=1.0, min_p=0.1, frequency_penalty=0.7, presence_penalty=0.2, seed=7, max_tokens=11),
        SamplingParams(temperature=0, logit_bias={17: 4.0, 23: -50.0}, max_tokens=10, ignore_eos=True),
    ]
    together = engine.generate(jobs, mixed)
    for job, params, output in zip(jobs, mixed, together):
        assert alone(engine, job, params) == output.outputs[0].token_ids


def test_requests_join_and_leave_at_every_step(engine):
    jobs = prompts(5)
    expected = [alone(engine, job) for job in jobs]
    results = {}
    names = []
    for job in jobs:
        names.append(engine.add(job, GREEDY, on_output=lambda o: results.__setitem__(o.request_id, o)))
        engine.step()
        engine.step()
    drain(engine)
    assert [results[name].outputs[0].token_ids for name in names] == expected


def test_n_completions_share_the_prompt_and_equal_single_requests_with_their_seeds(engine):
    prompt = prompts(1, length=40)[0]
    engine.reset_stats()
    params = SamplingParams(n=4, temperature=1.3, seed=3, max_tokens=10, ignore_eos=True)
    output = engine.generate([prompt], params)[0]
    texts = [tuple(completion.token_ids) for completion in output.outputs]
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert engine.stats()["tokens"] <= 40 + 4 * 10  # the prompt ran once
    assert tuple(engine.generate([prompt], params)[0].outputs[2].token_ids) == texts[2]


def test_logprobs_are_those_of_stock(engine, model):
    prompt = prompts(1, length=37)[0]
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    output = engine.generate([prompt], params)[0]
    completion = output.outputs[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    for position, entry in enumerate(output.prompt_logprobs[1:], 1):
        row = logits[position - 1]
        assert entry[prompt[position]].logprob == pytest.approx(row[prompt[position]].item(), abs=1e-4)
        assert entry[prompt[position]].rank == int((row > row[prompt[position]]).sum()) + 1
        assert set(row.topk(2).indices.tolist()) <= set(entry)
    for index, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs)):
        row = logits[len(prompt) - 1 + index]
        assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert set(row.topk(3).indices.tolist()) <= set(entry)
    assert completion.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs))
    )


def test_stop_strings_tokens_and_min_tokens(engine, tokenizer):
    prompt = prompts(1)[0]
    free = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))[0].outputs[0]
    assert free.finish_reason == "length"
    stop = free.text[len(free.text) // 2 :][:2]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=[stop])
    stopped = engine.generate([prompt], params)[0].outputs[0]
    assert stopped.text == free.text[: free.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    kept = engine.generate(
        [prompt],
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=stop, include_stop_str_in_output=True),
    )[0].outputs[0]
    assert kept.text == free.text[: free.text.index(stop) + len(stop)]

    token = free.token_ids[5]
    first = free.token_ids.index(token)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=[token])
    ended = engine.generate([prompt], params)[0].outputs[0]
    assert ended.token_ids == free.token_ids[: first + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)
    later = engine.generate(
        [prompt],
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=[token], min_tokens=12),
    )[0].outputs[0]
    assert len(later.token_ids) >= 12 and token not in later.token_ids[:12]


def test_eos_ends_with_stop_and_its_text_is_left_out(model, tokenizer):
    eos = 77
    saved = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = eos
    try:
        with Engine(model, tokenizer) as engine:
            params = SamplingParams(temperature=0, max_tokens=5, logit_bias={eos: 1000.0})
            completion = engine.generate([prompts(1)[0]], params)[0].outputs[0]
            assert completion.token_ids == [eos] and completion.text == ""
            assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    finally:
        model.generation_config.eos_token_id = saved


def test_bad_words_never_appear(engine, tokenizer):
    prompt = prompts(1)[0]
    letters = {token: 30.0 for token in tokenizer.convert_tokens_to_ids(["b", "c", "d", "f"])}
    params = dict(temperature=0, max_tokens=20, ignore_eos=True, logit_bias=letters)
    free = engine.generate([prompt], SamplingParams(**params))[0].outputs[0].text
    word = free[3:6]
    text = engine.generate([prompt], SamplingParams(**params, bad_words=[word]))[0].outputs[0].text
    assert word in free and word not in text


def test_text_prompts_and_chat_messages(engine, tokenizer, model):
    output = engine.generate("hello there", GREEDY)[0]
    assert output.prompt == "hello there"
    assert output.prompt_token_ids == tokenizer("hello there")["input_ids"]
    ids = torch.tensor([output.prompt_token_ids])
    stock = tiny_model("qwen3", vocab_size=320).generate(ids, max_new_tokens=12, do_sample=False)
    assert output.outputs[0].token_ids == stock[0, ids.shape[1] :].tolist()
    assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)
    with pytest.raises(InvalidArgument, match="chat template"):
        engine.generate([{"role": "user", "content": "hi"}], GREEDY)


@pytest.mark.parametrize(
    "fault",
    [
        dict(logits_processors=[lambda ids, logits: 1 / 0]),
        dict(logits_processors=[lambda ids, logits: logits[:5]]),
        dict(logits_processors=[lambda ids, logits: logits * float("nan")]),
        dict(stopping_criteria=[lambda ids: {}["missing"]]),
    ],
    ids=["raises", "wrong-shape", "nan", "criterion-raises"],
)
def test_a_callable_that_fails_ends_its_own_request_only(engine, fault):
    jobs = prompts(4)
    expected = [alone(engine, job) for job in jobs]
    results = {}
    keep = lambda o: results.__setitem__(o.request_id, o)  # noqa: E731
    names = [engine.add(job, GREEDY, on_output=keep, **(fault if i == 1 else {})) for i, job in enumerate(jobs)]
    drain(engine)
    for index, name in enumerate(names):
        if index == 1:
            assert isinstance(results[name].error, RequestFailed)
            assert results[name].outputs[0].finish_reason == "error"
        else:
            assert results[name].outputs[0].token_ids == expected[index]


def test_a_forward_that_fails_for_one_request_is_bisected(engine, model):
    jobs = prompts(6)
    expected = [alone(engine, job) for job in jobs]
    poison = 311

    def refuse(module, args, kwargs=None):
        if (args[0] == poison).any():
            raise RuntimeError("poisoned")

    handle = model.get_input_embeddings().register_forward_pre_hook(refuse)
    results = {}
    keep = lambda o: results.__setitem__(o.request_id, o)  # noqa: E731
    try:
        jobs[3] = jobs[3][:-1] + [poison]
        names = [engine.add(job, GREEDY, on_output=keep) for job in jobs]
        drain(engine)
    finally:
        handle.remove()
    for index, name in enumerate(names):
        if index == 3:
            assert "poisoned" in str(results[name].error)
        else:
            assert results[name].error is None
            assert results[name].outputs[0].token_ids == expected[index]


def test_a_forward_that_fails_only_for_large_batches_still_finishes_everyone(engine, model):
    jobs = prompts(6)
    expected = [alone(engine, job) for job in jobs]

    def refuse(module, args):
        if args[0].shape[1] > 30:
            raise MemoryError("too many tokens")

    handle = model.get_input_embeddings().register_forward_pre_hook(refuse)
    try:
        outputs = engine.generate(jobs, GREEDY)
    finally:
        handle.remove()
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_abort_at_every_step_frees_everything(engine):
    jobs = prompts(3, length=50)
    for steps in range(8):
        names = [engine.add(job, SamplingParams(n=2, max_tokens=6, ignore_eos=True)) for job in jobs]
        for _ in range(steps):
            engine.step()
        for name in names:
            engine.abort(name)
        assert not engine.abort(names[0])
        assert not engine.has_unfinished()
        assert engine.stats()["kv_bytes_in_use"] == 0
        engine.check_integrity()


def test_deadlines_end_with_their_own_error(engine):
    late = engine.submit(prompts(1)[0], SamplingParams(max_tokens=200, ignore_eos=True), deadline=0.01)
    engine.step()
    time.sleep(0.02)
    drain(engine)
    assert isinstance(late.output.error, DeadlineExceeded)
    with pytest.raises(TimeoutError):
        late.raise_error()


def test_priority_runs_first(model, tokenizer):
    with Engine(model, tokenizer, EngineConfig(max_num_seqs=1, policy="priority")) as engine:
        order = []
        for priority in (5, 1, 3):
            engine.add(
                prompts(1)[0],
                SamplingParams(max_tokens=2, ignore_eos=True),
                priority=priority,
                on_output=lambda o, p=priority: order.append(p) if o.finished else None,
            )
        drain(engine)
        assert order == [1, 3, 5]


def test_prefixes_are_computed_once_also_within_one_step(model, tokenizer):
    shared = prompts(1, length=160)[0]
    jobs = [shared + tail for tail in prompts(8, length=6, seed=1)]
    with Engine(model, tokenizer, EngineConfig(block_size=16, max_batch_tokens=512)) as engine:
        expected = [alone(engine, job) for job in jobs]
    with Engine(model, tokenizer, EngineConfig(block_size=16, max_batch_tokens=512)) as engine:
        outputs = engine.generate(jobs, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert engine.stats()["tokens"] <= 160 + 8 * (6 + 12)
        assert sum(output.metrics.num_cached_tokens for output in outputs) == 7 * 160
        salted = engine.submit(jobs[0], GREEDY, cache_salt="mine")
        drain(engine)
        assert salted.output.outputs[0].token_ids == expected[0]
        assert salted.output.metrics.num_cached_tokens == 0


def test_the_cache_grows_on_demand_and_stays_within_its_bound(model):
    with Engine(model, config=EngineConfig(block_size=16, kv_cache_memory="512KiB")) as engine:
        assert engine.stats()["kv_bytes_allocated"] < 256 << 10
        engine.generate(prompts(12, length=100), GREEDY)
        assert 256 << 10 < engine.stats()["kv_bytes_allocated"] <= 512 << 10


BAD_REQUESTS = [
    (dict(prompt=[]), "prompt"),
    (dict(prompt="x", params={"n": 2}), "params"),
    (dict(prompt=[4, -1]), "token id -1"),
    (dict(prompt=[4, 320]), "token id 320"),
    (dict(prompt=[4, 1.5]), "1.5"),
    (dict(prompt=[[4]]), "flat list"),
    (dict(prompt=7), "prompt"),
    (dict(prompt=[5] * 600), "512"),
    (dict(prompt=[5], params=SamplingParams(stop_token_ids=[999])), "stop_token_ids"),
    (dict(prompt=[5], params=SamplingParams(logit_bias={4000: 1.0})), "logit_bias"),
    (dict(prompt=[5], params=SamplingParams(n=100)), "n"),
    (dict(prompt=[5], deadline=-1), "deadline"),
    (dict(prompt=[5], priority="high"), "priority"),
    (dict(prompt=[5], request_id=3), "request_id"),
    (dict(prompt=[5], priority=2), "priority"),
    (dict(prompt=[5], cache_salt=10**10), "cache_salt"),
]


@pytest.mark.parametrize("request_, name", BAD_REQUESTS, ids=[f"{i}-{n}" for i, (_, n) in enumerate(BAD_REQUESTS)])
def test_bad_requests_name_what_is_wrong(engine, request_, name):
    with pytest.raises(InvalidArgument, match=name):
        engine.add(**request_)


def test_text_held_back_appears_when_a_criterion_ends_the_completion(engine, tokenizer):
    letter = tokenizer.convert_tokens_to_ids("b")
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logit_bias={letter: 1000.0}, stop=["bbbbb"])
    results = {}
    name = engine.add(
        prompts(1)[0],
        params,
        stopping_criteria=[lambda ids: len(ids) >= 23],
        on_output=lambda output: results.__setitem__(output.request_id, output),
    )
    drain(engine)
    assert results[name].outputs[0].text == "bbb" and results[name].outputs[0].finish_reason == "stop"


def test_one_failed_prompt_keeps_the_others_results(engine, model):
    def refuse(module, args):
        if (args[0] == 311).any():
            raise RuntimeError("poisoned")

    handle = model.get_input_embeddings().register_forward_pre_hook(refuse)
    try:
        with pytest.raises(RequestFailed, match="poisoned") as caught:
            engine.generate([[5, 6], [311], [7, 8]], GREEDY)
    finally:
        handle.remove()
    assert [output.error is None for output in caught.value.outputs] == [True, False, True]
    assert caught.value.outputs[2].outputs[0].token_ids == alone(engine, [7, 8])


def test_a_step_within_a_step_fails_its_own_request(engine):
    state = engine.submit(prompts(1)[0], GREEDY)
    engine.add(prompts(1)[0], GREEDY, stopping_criteria=[lambda ids: engine.step()])
    drain(engine)
    assert state.output.error is None and len(state.output.outputs[0].token_ids) == 12


def test_an_interrupt_leaves_no_request_with_a_missing_token(engine):
    jobs = prompts(3)
    expected = [alone(engine, job) for job in jobs]
    fired = []

    def interrupt(ids):
        if len(ids) == 24 and not fired:
            fired.append(True)
            raise KeyboardInterrupt

    engine.add(jobs[0], GREEDY, stopping_criteria=[interrupt])
    others = [engine.submit(job, GREEDY) for job in jobs[1:]]
    with pytest.raises(KeyboardInterrupt):
        drain(engine)
    drain(engine)
    for state, tokens in zip(others, expected[1:]):
        assert state.output.error is not None or state.output.outputs[0].token_ids == tokens


def test_more_prompts_than_the_queue_holds(model):
    with Engine(model, config=EngineConfig(max_queue=2, max_num_seqs=2)) as engine:
        assert len(engine.generate(prompts(7), GREEDY)) == 7
        assert model.generate(torch.tensor(prompts(7)), max_new_tokens=3, do_sample=False).shape == (7, 23)


def test_requests_that_can_never_fit_are_refused(model):
    with Engine(model, config=EngineConfig(block_size=16, kv_cache_memory="64KiB")) as engine:
        with pytest.raises(RequestTooLarge, match="kv_cache_memory|blocks"):
            engine.add([5] * 400, SamplingParams(max_tokens=50))
        assert alone(engine, [5] * 20)
    with Engine(model, config=EngineConfig(max_queue=2)) as engine:
        for _ in range(2):
            engine.add([5], GREEDY)
        with pytest.raises(QueueFull):
            engine.add([5], GREEDY)
        drain(engine)


def test_close_ends_requests_and_refuses_new_ones(model):
    engine = Engine(model)
    waiting = engine.submit([5, 6], GREEDY)
    engine.close()
    engine.close()
    assert isinstance(waiting.output.error, EngineClosed)
    with pytest.raises(EngineClosed):
        engine.add([5], GREEDY)
    assert not hf_paged.hf.patch.is_patched(model)


def test_a_model_has_one_engine(model):
    with Engine(model):
        with pytest.raises(InvalidArgument, match="already has an engine"):
            Engine(model)
    with Engine(model) as engine:
        assert hf_paged.engine_of(model) is engine


def test_many_threads_generate_at_once(engine):
    jobs = prompts(8)
    expected = [alone(engine, job) for job in jobs]
    results: list = [None] * 8

    def work(index):
        results[index] = alone(engine, jobs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == expected


def test_bf16_cache_under_an_fp32_model_stays_close(model):
    prompt = prompts(1, length=60)[0]
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True)
    with Engine(model) as engine:
        full = engine.generate([prompt], params)[0].outputs[0].logprobs[0]
    with Engine(model, config=EngineConfig(kv_dtype="bfloat16")) as engine:
        half = engine.generate([prompt], params)[0].outputs[0].logprobs[0]
    shared = set(full) & set(half)
    assert shared and all(abs(full[t].logprob - half[t].logprob) < 0.3 for t in shared)


class TestAsync:
    def run(self, coroutine):
        return asyncio.run(asyncio.wait_for(coroutine, 60))

    def test_streams_grow_and_end_with_the_engine_s_tokens(self, model, tokenizer):
        jobs = prompts(5)
        with Engine(model, tokenizer) as engine:
            expected = [alone(engine, job) for job in jobs]

        async def one(engine, job):
            seen = []
            async for output in engine.generate(job, GREEDY):
                seen.append(list(output.outputs[0].token_ids))
            assert all(a == b[: len(a)] for a, b in zip(seen, seen[1:]))
            return seen[-1]

        async def main():
            async with AsyncEngine(Engine(model, tokenizer)) as engine:
                return await asyncio.gather(*(one(engine, job) for job in jobs))

        assert self.run(main()) == expected

    def test_what_is_streamed_adds_up_to_the_output(self, model, tokenizer):
        """Text, tokens and log-probabilities, also of readers that miss steps, of several completions, up to a stop string."""
        jobs = prompts(4)
        params = [
            SamplingParams(n=3, seed=1, max_tokens=30, logprobs=2, ignore_eos=True),
            SamplingParams(seed=2, max_tokens=60, stop=["a", "e"], min_tokens=5),
            SamplingParams(seed=3, max_tokens=20, prompt_logprobs=1),
            GREEDY,
        ]
        with Engine(model, tokenizer) as engine:
            expected = engine.generate(jobs, params)

        async def one(engine, job, options, pause):
            sums, last = {}, None
            async for delta in engine.stream(job, options):
                for completion in delta.outputs:
                    before = sums.get(completion.index)
                    assert before is None or before.finish_reason is None
                    sums[completion.index] = completion if before is None else before.then(completion)
                last = delta
                await asyncio.sleep(pause)
            return [sums[index] for index in sorted(sums)], last

        async def main():
            async with AsyncEngine(Engine(model, tokenizer)) as engine:
                pauses = (0.0, 0.03, 0.0, 0.2)
                return await asyncio.gather(*(one(engine, *job) for job in zip(jobs, params, pauses)))

        for (sums, last), whole in zip(self.run(main()), expected, strict=True):
            assert last.finished and last.prompt_token_ids == whole.prompt_token_ids
            assert last.prompt_logprobs == whole.prompt_logprobs
            for completion, output in zip(sums, whole.outputs, strict=True):
                for name in ("text", "token_ids", "logprobs", "finish_reason", "stop_reason"):
                    assert getattr(completion, name) == getattr(output, name)

    def test_a_step_wakes_the_loop_once(self, model, tokenizer):
        async def main():
            calls = 0
            loop = asyncio.get_running_loop()
            async with AsyncEngine(Engine(model, tokenizer)) as engine:
                await engine.complete(prompts(1)[0], GREEDY)  # whatever is done once
                call = loop.call_soon_threadsafe

                def counted(function, *args, **options):
                    nonlocal calls
                    calls += threading.current_thread().name == "hf_paged-engine"
                    return call(function, *args, **options)

                loop.call_soon_threadsafe = counted
                engine.engine.reset_stats()
                await asyncio.gather(*(engine.complete(job, GREEDY) for job in prompts(16)))
                assert 0 < calls <= engine.engine.stats()["steps"]

        self.run(main())

    def test_cancelling_aborts_and_others_go_on(self, model, tokenizer):
        jobs = prompts(2)
        with Engine(model, tokenizer) as engine:
            expected = alone(engine, jobs[1])

        async def main():
            inner = Engine(model, tokenizer)
            async with AsyncEngine(inner) as engine:
                long = asyncio.create_task(
                    engine.complete(jobs[0], SamplingParams(max_tokens=450, ignore_eos=True))
                )
                await asyncio.sleep(0.05)
                long.cancel()
                result = await engine.complete(jobs[1], GREEDY)
                with pytest.raises(asyncio.CancelledError):
                    await long
                for _ in range(200):
                    if not inner.has_unfinished():
                        break
                    await asyncio.sleep(0.01)
                assert not inner.has_unfinished()
                assert inner.stats()["kv_bytes_in_use"] == 0
                return result.outputs[0].token_ids

        assert self.run(main()) == expected

    def test_many_come_and_go_at_once(self, model, tokenizer):
        """Half of them are cancelled, some before they were admitted; ids may be used again."""
        jobs = prompts(60, length=8)
        with Engine(model, tokenizer) as engine:
            expected = [output.outputs[0].token_ids for output in engine.generate(jobs, GREEDY)]

        async def main():
            inner = Engine(model, tokenizer, EngineConfig(max_num_seqs=8))
            async with AsyncEngine(inner) as engine:
                tasks = [asyncio.create_task(engine.complete(job, GREEDY, request_id=str(i))) for i, job in enumerate(jobs)]
                for count, task in enumerate(tasks[::2]):
                    if count % 8 == 0:
                        await asyncio.sleep(0.01)
                    task.cancel()
                again = [asyncio.create_task(engine.complete(jobs[i], GREEDY, request_id=f"{i}'")) for i in range(0, 60, 2)]
                results = await asyncio.gather(*tasks, return_exceptions=True)
                for i, output in enumerate(await asyncio.gather(*again)):
                    assert output.outputs[0].token_ids == expected[2 * i]
                for i, output in enumerate(results):
                    if i % 2:
                        assert output.outputs[0].token_ids == expected[i]
                    else:
                        assert isinstance(output, asyncio.CancelledError)
                assert (await engine.complete(jobs[0], GREEDY, request_id="0")).outputs[0].token_ids == expected[0]
                assert not inner.has_unfinished() and inner.stats()["kv_bytes_in_use"] == 0

        self.run(main())

    def test_who_comes_too_late_is_told(self, model, tokenizer):
        async def main():
            engine = AsyncEngine(Engine(model, tokenizer))
            waiting = [asyncio.create_task(engine.complete(job, GREEDY)) for job in prompts(20)]
            await asyncio.sleep(0)
            await engine.close()
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(end, EngineClosed) or end.finished for end in ends)
            with pytest.raises(EngineClosed):
                await engine.complete(prompts(1)[0], GREEDY)

        self.run(main())

    def test_errors_deadlines_aborts_and_close_reach_their_own_waiter(self, model, tokenizer):
        async def main():
            engine = AsyncEngine(Engine(model, tokenizer))
            endless = SamplingParams(max_tokens=480, ignore_eos=True)
            with pytest.raises(InvalidArgument):
                await engine.complete([], GREEDY)
            with pytest.raises(DeadlineExceeded):
                await engine.complete([5, 6], endless, deadline=0.02)
            task = asyncio.create_task(engine.complete([5, 6], endless, request_id="mine"))
            await asyncio.sleep(0.05)
            assert await engine.abort("mine")
            assert (await task).outputs[0].finish_reason == "abort"
            assert not await engine.abort("mine")
            task = asyncio.create_task(engine.complete([5, 6], endless))
            await asyncio.sleep(0.05)
            await engine.close()
            with pytest.raises(EngineClosed):
                await task

        self.run(main())
