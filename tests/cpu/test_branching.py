"""Requests that go on from the middle of another's output, or back in their own: as if they had sampled it themselves."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from dataclasses import replace

import pytest
from PIL import Image
from tiny_models import tiny_model
from tiny_processors import tiny_pair
from tiny_tokenizer import tiny_tokenizer

from hf_paged import (
    AsyncEngine,
    Branch,
    EmbedParams,
    Engine,
    EngineConfig,
    InvalidArgument,
    SamplingParams,
    Speculation,
    UnsupportedOption,
)

EOS, VOCAB = 2, 320
PROMPT = list(range(30, 63))
SCHEMA = {"json": {"type": "array", "items": {"enum": ["north", "south"]}, "minItems": 2, "maxItems": 4}, "disable_any_whitespace": True}
KINDS = {
    "greedy": dict(temperature=0.0, logprobs=2, ignore_eos=True),
    "seeded": dict(temperature=0.9, seed=3, logprobs=0, ignore_eos=True),
    "penalties": dict(temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.7, presence_penalty=0.3, logprobs=1, ignore_eos=True),
    "bad words": dict(temperature=0.8, seed=1, bad_words=["a", "e"], min_tokens=12),
    "form": dict(temperature=1.0, seed=5, structured_outputs=SCHEMA, max_tokens=40),
}


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", vocab_size=VOCAB)
    model.generation_config.eos_token_id = EOS
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(VOCAB)


WAYS = {"plain": {}, "overlap": dict(overlap=True), "speculation": dict(speculation=Speculation("ngram"))}
in_every_way = pytest.mark.parametrize("engine", WAYS, indirect=True)


@pytest.fixture
def engine(request, model, tokenizer):
    more = WAYS[getattr(request, "param", "plain")]
    with Engine(model, tokenizer, EngineConfig(block_size=16, **more)) as engine:
        yield engine
        engine.check_integrity()
        assert engine.stats()["kv_bytes_in_use"] == 0


def told(completion) -> tuple:
    """All that an output says but its index."""
    logprobs = completion.logprobs
    if logprobs is not None:
        logprobs = [[(token, one.logprob, one.rank, one.decoded) for token, one in entry.items()] for entry in logprobs]
    ends = completion.finish_reason, completion.stop_reason
    return completion.text, completion.token_ids, logprobs, completion.cumulative_logprob, ends


def params(kind: str, **more) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 24, **KINDS[kind], **more})


def run_to(engine, outputs: list, num_tokens: int, index: int = 0) -> None:
    """Step until a completion of the last of `outputs` has so many tokens."""
    while not outputs or len(outputs[-1].outputs) <= index or len(outputs[-1].outputs[index].token_ids) < num_tokens:
        assert engine.has_unfinished()
        engine.step()


def finish(engine) -> None:
    while engine.has_unfinished():
        engine.step()
        engine.check_integrity()


@in_every_way
@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_goes_on_as_the_request_did(engine, kind):
    (whole,) = engine.generate("Tell me", params(kind))
    prompt, tokens = whole.prompt_token_ids, whole.outputs[0].token_ids
    for kept in (0, 1, len(tokens) // 2, len(tokens) - 1):
        branch = engine.fork(whole, len(prompt) + kept)
        assert len(branch) == len(prompt) + kept
        (again,) = engine.generate(branch)
        assert told(again.outputs[0]) == told(whole.outputs[0])
        assert again.prompt == "Tell me" and again.metrics.num_cached_tokens == (len(branch) - 1) // 16 * 16


@in_every_way
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_goes_back_as_if_it_had_never_come_further(engine, kind):
    (expected,) = engine.generate(PROMPT, params(kind))
    outputs = []
    request_id = engine.add(PROMPT, params(kind), on_output=outputs.append)
    run_to(engine, outputs, 8)
    output = outputs[-1]
    for kept in (7, 7, 3, 0):
        before = output.outputs[0]
        engine.roll_back(request_id, len(PROMPT) + kept)
        engine.check_integrity()
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids[:kept] and len(output.outputs) == 1
        assert before.token_ids[:kept] == output.outputs[0].token_ids and len(before.token_ids) >= kept
        if kept == 3:
            run_to(engine, outputs, 6)
    finish(engine)
    assert told(output.outputs[0]) == told(expected.outputs[0])


@in_every_way
def test_a_callback_may_reject_what_came(engine):
    """Until it is content: here with as many seeds as it takes."""
    first = SamplingParams(max_tokens=12, seed=77, ignore_eos=True)
    (plain,) = engine.generate(PROMPT, first)
    unwanted, tried, done = plain.outputs[0].token_ids[3], [first], []

    def look(output):
        tokens = output.outputs[0].token_ids
        if tokens[3:4] == [unwanted]:
            tried.append(replace(first, seed=len(tried)))
            engine.roll_back(output.request_id, len(PROMPT) + 2, tried[-1])
        done.append(output)

    engine.add(PROMPT, first, on_output=look)
    finish(engine)
    assert len(tried) > 1 and done[-1].outputs[0].token_ids[3] != unwanted
    (expected,) = engine.generate(engine.fork(plain, len(PROMPT) + 2), tried[-1])
    assert told(done[-1].outputs[0]) == told(expected.outputs[0])
    assert engine.fork(done[-1]).params == tried[-1]


def test_stop_strings_reach_across_the_position(engine, tokenizer):
    (plain,) = engine.generate("Tell me", params("greedy"))
    text = plain.outputs[0].text
    stop = text[5:11]
    (whole,) = engine.generate("Tell me", params("greedy", stop=stop))
    assert whole.outputs[0].stop_reason == stop
    prompt, tokens = whole.prompt_token_ids, whole.outputs[0].token_ids
    for kept in range(len(tokens)):
        (again,) = engine.generate(engine.fork(whole, len(prompt) + kept))
        assert told(again.outputs[0]) == told(whole.outputs[0])
    with pytest.raises(InvalidArgument, match="stop string"):
        engine.add(engine.fork(whole))
    with pytest.raises(InvalidArgument, match="stop string"):
        engine.add(engine.fork(plain, len(prompt) + len(tokens) + 1), params("greedy", stop=stop))
    engine.generate(engine.fork(whole), params("greedy"))


def test_many_continuations_of_one_position(engine):
    """They share the blocks up to there; each is what a request of its own would give, n completions of one, too."""
    (whole,) = engine.generate(PROMPT, params("seeded"))
    branch = engine.fork(whole, len(PROMPT) + 6)
    seeds = [replace(params("seeded"), seed=seed) for seed in (8, 9)] + [replace(params("seeded"), n=3)]
    outputs = engine.generate([branch] * 3, seeds)
    assert all(output.metrics.num_cached_tokens >= 32 for output in outputs)
    completions = [completion for output in outputs for completion in output.outputs]
    assert len(completions) == 5 and len({tuple(one.token_ids) for one in completions}) == 5
    for one in completions:
        assert one.token_ids[:6] == whole.outputs[0].token_ids[:6] and len(one.token_ids) == len(one.logprobs) == 24
    assert completions[2].token_ids == whole.outputs[0].token_ids
    by_hand = Branch(prompt_token_ids=PROMPT, output_token_ids=branch.output_token_ids)
    (alone,) = engine.generate(by_hand, replace(seeds[0], logprobs=None))
    assert alone.outputs[0].token_ids == completions[0].token_ids
    second = engine.fork(outputs[2], len(PROMPT) + 20, index=1)
    assert second.output_token_ids == outputs[2].outputs[1].token_ids[:20]


@in_every_way
def test_one_of_several_completions_goes_back(engine):
    several = params("seeded", n=3)
    (expected,) = engine.generate(PROMPT, several)
    outputs = []
    request_id = engine.add(PROMPT, several, on_output=outputs.append)
    run_to(engine, outputs, 8, index=2)
    engine.roll_back(request_id, len(PROMPT) + 2, index=1)
    engine.roll_back(request_id, len(PROMPT), index=2)
    engine.check_integrity()
    assert [len(one.token_ids) for one in outputs[-1].outputs][1:] == [2, 0]
    finish(engine)
    assert list(map(told, outputs[-1].outputs)) == list(map(told, expected.outputs))


def test_a_position_within_the_prompt(engine):
    (whole,) = engine.generate(PROMPT, params("greedy"))
    (expected,) = engine.generate(PROMPT[:20], params("greedy"))
    (again,) = engine.generate(engine.fork(whole, 20))
    assert told(again.outputs[0]) == told(expected.outputs[0]) and again.metrics.num_cached_tokens == 16


@in_every_way
def test_forks_of_running_requests_and_of_forks(engine):
    outputs = []
    request_id = engine.add(PROMPT, params("penalties"), on_output=outputs.append)
    assert len(engine.fork(request_id)) == len(PROMPT)
    run_to(engine, outputs, 5)
    branch = engine.fork(request_id, len(PROMPT) + 4)
    other = engine.add(branch, on_output=lambda output: outputs.append(output) if output.finished else None)
    deeper = engine.fork(other, len(PROMPT) + 3)
    assert deeper.output_token_ids == branch.output_token_ids[:3]
    engine.roll_back(other, len(PROMPT) + 1)  # before it has run
    engine.add(deeper, on_output=lambda output: outputs.append(output) if output.finished else None)
    finish(engine)
    first, *others = {output.request_id: output for output in outputs if output.finished}.values()
    assert len(others) == 2 and all(told(one.outputs[0]) == told(first.outputs[0]) for one in others)


@pytest.mark.parametrize("family", ["mistral-window", "gemma2", "jamba", "mamba2", "lfm2"])
def test_every_kind_of_layer(family):
    """What slides out of sight, and states, cannot be taken back: such requests compute their tokens again."""
    with Engine(tiny_model(family), config=EngineConfig(block_size=16)) as engine:
        wanted = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, detokenize=False)
        (expected,) = engine.generate(PROMPT, wanted)
        outputs = []
        request_id = engine.add(PROMPT, wanted, on_output=outputs.append)
        for steps, kept in ((12, 9), (8, 2), (24, 20)):
            for _ in range(steps):
                engine.step()
            engine.roll_back(request_id, len(PROMPT) + kept)
            engine.check_integrity()
        branch = engine.fork(request_id, len(PROMPT) + 11)
        finish(engine)
        assert outputs[-1].outputs[0].token_ids == expected.outputs[0].token_ids
        assert engine.generate(branch)[0].outputs[0].token_ids == expected.outputs[0].token_ids
        stats = engine.stats()
        assert stats["kv_bytes_in_use"] == stats["state_bytes_in_use"] == 0 and stats["preemptions"] == 0


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_images(family):
    model, processor, placeholder = tiny_pair(family)
    photo = Image.effect_mandelbrot((20, 12), (-2, -1, 1, 1), 50).convert("RGB")
    with Engine(model, processor, EngineConfig(block_size=16)) as engine:
        wanted = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
        (whole,) = engine.generate(f"a b {placeholder} what is this", wanted, images=[photo])
        prompt = whole.prompt_token_ids
        with pytest.raises(UnsupportedOption, match="while it runs"):
            engine.fork(whole)
        outputs = []
        request_id = engine.add(f"a b {placeholder} what is this", wanted, images=[photo], on_output=outputs.append)
        run_to(engine, outputs, 4)
        image = [place for place, token in enumerate(prompt) if token == engine.model.media.token_id]
        with pytest.raises(InvalidArgument, match="within an image"):
            engine.fork(request_id, image[0] + 2)
        assert engine.fork(request_id, image[0]).media.spans == ()
        branch, shorter = engine.fork(request_id, len(prompt) + 3), engine.fork(request_id, len(prompt) - 1)
        (again,) = engine.generate(branch)
        assert again.outputs[0].token_ids == whole.outputs[0].token_ids
        (expected,) = engine.generate(shorter)
        engine.reset_prefix_cache()
        assert engine.generate(shorter)[0].outputs == expected.outputs
        outputs = []
        request_id = engine.add(f"a b {placeholder} what is this", wanted, images=[photo], on_output=outputs.append)
        run_to(engine, outputs, 4)
        engine.roll_back(request_id, len(prompt))
        finish(engine)
        assert outputs[-1].outputs == whole.outputs


def test_salts_and_processors(engine):
    """A branch stays under its request's salt; functions are given anew with each request."""
    (whole,) = engine.generate(PROMPT, params("greedy"))
    outputs = []
    engine.add(PROMPT, params("greedy"), cache_salt="mine", on_output=outputs.append)
    finish(engine)
    branch = engine.fork(outputs[-1], len(PROMPT) + 2)
    assert branch.cache_salt == "mine" and engine.generate(branch)[0].metrics.num_cached_tokens == 32
    engine.reset_prefix_cache()
    engine.generate(PROMPT, params("greedy"))
    assert engine.generate(branch)[0].metrics.num_cached_tokens == 0
    with pytest.raises(InvalidArgument, match="cache_salt"):
        engine.add(branch, cache_salt="other")
    seen = []

    def processor(token_ids, logits):
        seen.append(len(token_ids))
        return logits

    engine.add(branch, logits_processors=[processor], on_output=outputs.append)
    finish(engine)
    assert seen[0] == len(branch) and told(outputs[-1].outputs[0]) == told(whole.outputs[0])


def test_wrong_forks_are_refused(engine):
    (whole,) = engine.generate(PROMPT, params("greedy"))
    total = len(PROMPT) + 24
    for position in (0, -1, total + 1, 3.0, True, "3"):
        with pytest.raises(InvalidArgument, match="^position"):
            engine.fork(whole, position)
    with pytest.raises(InvalidArgument, match="^index"):
        engine.fork(whole, index=1)
    for request in ("nobody", None, 3):
        with pytest.raises(InvalidArgument, match="no unfinished"):
            engine.fork(request)
    for copied in (pickle.loads(pickle.dumps(whole)), replace(whole)):
        assert copied == whole
        with pytest.raises(UnsupportedOption, match="Branch"):
            engine.fork(copied)
    with pytest.raises(InvalidArgument, match="max_tokens 24: the output has 24"):
        engine.add(engine.fork(whole))
    with pytest.raises(InvalidArgument, match="token 5"):
        engine.add(Branch(prompt_token_ids=PROMPT, output_token_ids=[4, 5, 6]), SamplingParams(stop_token_ids=[5]))
    with pytest.raises(InvalidArgument, match="token 2"):
        engine.add(Branch(prompt_token_ids=PROMPT, output_token_ids=[4, EOS]))
    with pytest.raises(InvalidArgument, match="logprobs 5"):
        engine.add(engine.fork(whole, total - 3), params("greedy", logprobs=5))
    with pytest.raises(InvalidArgument, match="outside the vocabulary"):
        engine.add(Branch(prompt_token_ids=PROMPT, output_token_ids=[999]))
    with pytest.raises(InvalidArgument, match="prompt is empty"):
        engine.add(Branch(prompt_token_ids=[]))
    with pytest.raises(InvalidArgument, match="EmbedParams"):
        engine.add(engine.fork(whole, 40), EmbedParams())
    with pytest.raises(InvalidArgument, match="media"):
        engine.add(Branch(prompt_token_ids=PROMPT, media=[1]))
    assert not engine.has_unfinished()
    (exact,) = engine.generate(engine.fork(whole, total - 1), params("greedy", logprobs=0, ignore_eos=True))
    assert exact.outputs[0].logprobs[3] == {
        exact.outputs[0].token_ids[3]: whole.outputs[0].logprobs[3][exact.outputs[0].token_ids[3]]
    }


def test_wrong_ways_back_are_refused(engine):
    with pytest.raises(InvalidArgument, match="no unfinished"):
        engine.roll_back("nobody", 3)
    outputs = []
    request_id = engine.add(PROMPT, params("greedy"), on_output=outputs.append)
    for _ in range(6):
        engine.step()
    length = len(PROMPT) + len(outputs[-1].outputs[0].token_ids)
    for position in (len(PROMPT) - 1, length + 9, "x"):
        with pytest.raises(InvalidArgument, match="^position"):
            engine.roll_back(request_id, position)
    with pytest.raises(InvalidArgument, match="with an n of 1"):
        engine.roll_back(request_id, length, params("greedy", n=2))
    with pytest.raises(InvalidArgument, match="prompt_logprobs"):
        engine.roll_back(request_id, length, params("greedy", prompt_logprobs=1))
    with pytest.raises(InvalidArgument, match="max_tokens 3"):
        engine.roll_back(request_id, len(PROMPT) + 3, params("greedy", max_tokens=3))
    with pytest.raises(InvalidArgument, match="n of 1"):
        engine.roll_back(request_id, len(PROMPT) + 3, EmbedParams())
    finish(engine)
    assert len(outputs[-1].outputs[0].token_ids) == 24
    with pytest.raises(InvalidArgument, match="fork"):
        engine.roll_back(request_id, len(PROMPT))
    embedding = engine.add(PROMPT, EmbedParams())
    with pytest.raises(UnsupportedOption, match="brings no tokens"):
        engine.roll_back(embedding, len(PROMPT))
    errors = []

    def hasty(token_ids, logits):
        try:
            engine.roll_back(hooked, len(PROMPT))
        except InvalidArgument as error:
            errors.append(error)
        return logits

    hooked = engine.add(PROMPT, params("greedy", max_tokens=1), logits_processors=[hasty])
    finish(engine)
    assert len(errors) == 1


def test_forward_hooks_are_nobody_elses(model):
    with Engine(model) as engine:
        outputs = []
        hooks = {"model.layers.1": lambda activation, positions: activation * 1.5}
        wanted = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        request_id = engine.add(PROMPT, wanted, forward_hooks=hooks, on_output=outputs.append)
        for _ in range(8):
            engine.step()
        with pytest.raises(UnsupportedOption, match="forward_hooks"):
            engine.fork(request_id)
        told_before = outputs[-1].outputs[0].token_ids[:8]
        engine.roll_back(request_id, len(PROMPT) + 2)
        finish(engine)
        assert outputs[-1].outputs[0].token_ids[:8] == told_before


def test_asyncio(model, tokenizer):
    async def work():
        async with AsyncEngine(Engine(model, tokenizer)) as engine:
            wanted = params("seeded", max_tokens=60)
            expected = await engine.complete(PROMPT, wanted)
            branch = await engine.fork(expected, len(PROMPT) + 30)
            assert told((await engine.complete(branch)).outputs[0]) == told(expected.outputs[0])
            tokens = []
            async for delta in engine.stream(branch):
                tokens += delta.outputs[0].token_ids
            assert tokens == expected.outputs[0].token_ids

            hold, went_back = threading.Event(), False

            def wait(token_ids):  # so that it does not end before it is told to go back
                return len(token_ids) > len(PROMPT) + 20 and not hold.wait(10)

            async for output in engine.generate(PROMPT, wanted, request_id="one", stopping_criteria=[wait]):
                if len(output.outputs[0].token_ids) >= 20 and not went_back:
                    went_back = True
                    back = asyncio.create_task(engine.roll_back("one", len(PROMPT) + 5))
                    hold.set()
                    await back
                assert output.outputs[0].token_ids == expected.outputs[0].token_ids[: len(output.outputs[0].token_ids)]
            assert went_back and told(output.outputs[0]) == told(expected.outputs[0])

            refused = []
            async for _ in engine.stream(PROMPT, wanted, request_id="two"):
                if not refused:
                    with pytest.raises(InvalidArgument) as error:
                        await engine.roll_back("two", len(PROMPT))
                    refused.append(str(error.value))
            assert "stream" in refused[0] or "no unfinished" in refused[0]

    asyncio.run(work())


def test_a_form_is_followed_to_its_end(model, tokenizer):
    with Engine(model, tokenizer) as engine:
        (whole,) = engine.generate("Where?", params("form"))
        values = json.loads(whole.outputs[0].text)
        for kept in range(1, len(whole.outputs[0].token_ids) - 1):
            branch = engine.fork(whole, len(whole.prompt_token_ids) + kept)
            other = engine.generate(branch, params("form", seed=kept))[0].outputs[0]
            assert other.token_ids[:kept] == whole.outputs[0].token_ids[:kept]
            assert set(json.loads(other.text)) <= {"north", "south"} >= set(values)
