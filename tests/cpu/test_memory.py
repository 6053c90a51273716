"""A KV cache that grows, shrinks, is given back and taken again under running requests: nobody's tokens change."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tiny_models import tiny_model

from hf_paged import AsyncEngine, CacheFull, Engine, EngineConfig, InvalidArgument, RequestTooLarge, SamplingParams
from hf_paged.hf.patch import is_patched

BLOCK = 16
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=3, n=2, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", vocab_size=320)


def config(**options) -> EngineConfig:
    return EngineConfig(block_size=BLOCK, max_batch_tokens=64, max_num_seqs=8, **options)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (10 + 7 * i,), generator=generator).tolist() for i in range(count)]


def block_bytes(engine) -> int:
    return sum(engine._cache.bytes_per_block(group) for group in range(len(engine._cache.groups)))


def stock(model, prompt: list[int], count: int) -> list[int]:
    assert not is_patched(model)
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()


def tokens(outputs) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def run(engine, jobs, params, between) -> list[list[int]]:
    """Run requests, calling `between(step number)` after every step; returns their tokens in order."""
    finished = {}
    for index, (job, one) in enumerate(zip(jobs, params)):
        engine.add(job, one, request_id=str(index))
    step = 0
    while engine.has_unfinished():
        for output in engine.step():
            finished[output.request_id] = output
        engine.check_integrity()
        step += 1
        between(step)
    return tokens(finished[str(index)] for index in range(len(jobs)))


@pytest.fixture(scope="module")
def expected(model):
    with Engine(model, config=config()) as engine:
        return tokens(engine.generate(prompts(5), [GREEDY] * 4 + [SAMPLED]))


def test_what_is_expected_is_stocks(model, expected):
    assert [stock(model, job, 40) for job in prompts(4)] == expected[:4]


@pytest.mark.parametrize("blocks", [40, 15, 9])
def test_shrinking_under_running_requests(model, expected, blocks):
    """With 40 blocks nobody is preempted, but blocks have to move: those of requests that ended are below."""
    with Engine(model, config=config(prefix_cache=False)) as engine:

        def between(step):
            if step == 12:
                engine.resize_kv_cache(blocks * block_bytes(engine))
                assert engine.stats()["kv_bytes_allocated"] <= blocks * block_bytes(engine)
                engine.check_integrity()

        assert run(engine, prompts(5), [GREEDY] * 4 + [SAMPLED], between) == expected
        stats = engine.stats()
        assert (stats["preemptions"] > 0) == (blocks < 40)
        assert stats["kv_bytes_peak"] > 9 * block_bytes(engine), "the requests did not need more than was left"


def test_growing_and_shrinking_all_the_time(model, expected):
    sizes = iter([20, 60, 12, 9, 200, 15, 33, 11, 50, 9] * 20)
    with Engine(model, config=config()) as engine:
        resize = lambda step: engine.resize_kv_cache(next(sizes) * block_bytes(engine))  # noqa: E731
        assert run(engine, prompts(5), [GREEDY] * 4 + [SAMPLED], resize) == expected
        engine.resize_kv_cache("64MiB")
        assert tokens(engine.generate(prompts(5), [GREEDY] * 4 + [SAMPLED])) == expected


def test_a_larger_cache_takes_what_the_smaller_one_refused(model, expected):
    with Engine(model, config=config(kv_cache_memory=3 * 16 * 1024)) as engine:
        engine.resize_kv_cache(3 * block_bytes(engine))
        with pytest.raises(RequestTooLarge, match="holds at most 3"):
            engine.add(prompts(4)[3], GREEDY)
        engine.resize_kv_cache(5 * block_bytes(engine))
        assert tokens(engine.generate(prompts(4)[3:], GREEDY)) == expected[3:4]


def test_requests_that_no_longer_fit_end_and_the_others_go_on(model, expected):
    with Engine(model, config=config()) as engine:
        ids = [engine.add(job, GREEDY) for job in prompts(4)]
        outputs = {}
        for step in range(200):
            if step == 5:  # 31 + 40 tokens take 5 blocks, 24 + 40 four
                engine.resize_kv_cache(4 * block_bytes(engine))
            outputs |= {output.request_id: output for output in engine.step()}
            if not engine.has_unfinished():
                break
        assert isinstance(outputs[ids[3]].error.__cause__, RequestTooLarge)
        assert tokens(outputs[name] for name in ids[:3]) == expected[:3]


def test_resizing_in_inference_mode(model, expected):
    """The cache outlives the caller's mode."""
    with Engine(model, config=config()) as engine:

        @torch.inference_mode()
        def between(step):
            if step % 7 == 0:
                engine.resize_kv_cache((20 - step // 7) * block_bytes(engine))

        assert run(engine, prompts(5), [GREEDY] * 4 + [SAMPLED], between) == expected


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_prefixes_survive_a_move(model, prefix_cache):
    """Cached blocks within the new size are still found, and hold what they held."""
    shared = prompts(6)[5]
    with Engine(model, config=config(prefix_cache=prefix_cache)) as engine:
        first = tokens(engine.generate([shared], GREEDY))
        engine.resize_kv_cache(12 * block_bytes(engine))
        engine.reset_stats()
        assert tokens(engine.generate([shared], GREEDY)) == first
        assert (engine.stats()["prefix_hit_tokens"] > 0) == prefix_cache


@pytest.mark.parametrize("memory", [1, 0, -5, "nothing", 2.5, None])
def test_sizes_that_are_none_are_refused(model, memory):
    with Engine(model, config=config()) as engine, pytest.raises(InvalidArgument, match="memory must"):
        engine.resize_kv_cache(memory)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_next"])
def test_sleeping_in_the_middle(family):
    """Full attention, sliding windows, layers that keep a state."""
    model = tiny_model(family, vocab_size=320)
    jobs = prompts(4)
    plain = [stock(model, job, 24) for job in jobs]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with Engine(model, config=config()) as engine:

        def between(step):
            if step in (1, 6, 7, 20):
                engine.sleep()
                stats = engine.stats()
                assert stats["kv_bytes_allocated"] == stats["state_bytes_allocated"] == 0
                assert stats["kv_bytes_in_use"] == stats["state_bytes_in_use"] == stats["running"] == 0
                assert engine.sleeping
                engine.check_integrity()
            if step == 7:
                engine.wake_up()
                assert not engine.sleeping

        assert run(engine, jobs, [params] * 4, between) == plain
        assert not engine.sleeping


def test_sampled_requests_and_their_siblings_sleep_too(model, expected):
    with Engine(model, config=config()) as engine:
        sleep = lambda step: engine.sleep() if step % 9 == 0 else None  # noqa: E731
        assert run(engine, prompts(5), [GREEDY] * 4 + [SAMPLED], sleep) == expected


def test_weights_may_change_in_ones_sleep(model):
    model = tiny_model("llama", vocab_size=320)
    job = prompts(4)[3]
    with Engine(model, config=config()) as engine:
        before = tokens(engine.generate([job], GREEDY))
        engine.sleep()
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(-1)
        after = tokens(engine.generate([job], GREEDY))
    assert after == [stock(model, job, 40)] and after != before


def test_rows_that_somebody_holds_keep_the_engine_awake(model):
    """Beams, and caches that generate returned: nobody could compute again what they have."""
    job = prompts(4)[3]
    following = stock(model, [*job, 7], 1)
    with Engine(model, config=config()) as engine:
        rows = engine.hold(1)
        before = rows.forward([job])[0].result
        with pytest.raises(CacheFull, match="delete the cache"):
            engine.sleep()
        with pytest.raises(CacheFull, match="hold 2 KV blocks"):
            engine.resize_kv_cache(block_bytes(engine))
        assert engine.stats()["kv_bytes_in_use"] > 0 and not engine.sleeping
        engine.resize_kv_cache(2 * block_bytes(engine))
        other = engine.hold(1)
        with pytest.raises(CacheFull):
            other.forward([job])
        other.close()
        assert torch.equal(rows.forward([[7]])[0].result.argmax(-1), torch.tensor(following))
        rows.close()
        engine.sleep()
        assert engine.stats()["kv_bytes_allocated"] == 0
        again = engine.hold(1)
        assert torch.equal(again.forward([job])[0].result, before) and not engine.sleeping
        again.close()


def test_nothing_of_this_in_the_middle_of_a_step(model):
    raised = []
    with Engine(model, config=config()) as engine:

        def criterion(token_ids):
            for change in (engine.sleep, engine.wake_up, lambda: engine.resize_kv_cache("1GiB")):
                with pytest.raises(InvalidArgument, match="in the middle of a step"):
                    change()
                raised.append(change)
            return True

        engine.add(prompts(1)[0], GREEDY, stopping_criteria=[criterion])
        while engine.has_unfinished():
            engine.step()
    assert len(raised) == 3


def test_a_draft_model_sleeps_with_the_main_one(model, expected):
    draft = tiny_model("qwen3", vocab_size=320, seed=1, num_hidden_layers=1)
    jobs = prompts(3)
    with Engine(model, config=config(), draft_model=draft) as engine:
        sleep = lambda step: engine.sleep() if step == 8 else None  # noqa: E731
        assert run(engine, jobs, [GREEDY] * 3, sleep) == expected[:3]
        assert engine.stats()["draft_tokens"] > 0
        engine.sleep()
        assert engine._draft_engine.stats()["kv_bytes_allocated"] == 0


def test_an_async_engine_rests_until_it_is_woken(model, expected):
    async def main():
        async with AsyncEngine(Engine(model, config=config())) as engine:
            running = [asyncio.create_task(engine.complete(job, GREEDY)) for job in prompts(2)]
            while not engine.engine.stats()["output_tokens"]:
                await asyncio.sleep(0.01)
            await engine.sleep()
            late = asyncio.create_task(engine.complete(prompts(4)[2], GREEDY))
            await asyncio.sleep(0.3)
            stats = engine.engine.stats()
            assert stats["kv_bytes_allocated"] == 0 and stats["waiting"] == 3 and not any(task.done() for task in running)
            await engine.wake_up()
            await engine.resize_kv_cache("16MiB")
            return [await task for task in (*running, late)]

    assert tokens(asyncio.run(main())) == expected[:3]
