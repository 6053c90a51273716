"""Whatever one engine can hold at once, each request gets what it gets alone.

Random mixtures of requests of every kind, on engines of every configuration and policy, stepped here or by AsyncEngine, with
aborts, and with calls of `generate` in another thread (beams, guided beams, assisted, with callables of the caller's): the
same tokens, texts and reasons to stop, log-probabilities to 1e-4, embeddings to 1e-5, and no block lost. Models that take
images get requests with and without some, in the same steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from dataclasses import dataclass

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_adapters import LAYERS, TUNERS, WARNINGS, shake
from tiny_configs import FAMILIES, IMAGE
from tiny_models import tiny_config, tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForSequenceClassification
from vision_inputs import batch, joined
from vision_inputs import prompt as with_images

import hf_paged
from hf_paged import (
    AsyncEngine,
    ClassifyParams,
    EmbedParams,
    Engine,
    EngineConfig,
    SamplingParams,
    ScoreParams,
    StructuredOutputsProcessor,
)

pytestmark = pytest.mark.filterwarnings(*WARNINGS)

VOCAB, EOS, PAD = 320, 2, 0
PREFIXES = [(), (7,) * 20, tuple(range(30, 78)), tuple(range(30, 64))]
VISION = ("qwen2_vl", "gemma3")  # positions in three planes, and images whose tokens see each other
ADAPTERS = {name: TUNERS[name] for name in ("lora", "lora-dora", "ia3")}  # the last runs apart, in forwards of its own
ADAPTERS["rslora"] = ("LoraConfig", dict(r=3, use_rslora=True, **LAYERS))
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
FORMS = [{"choice": ["north", "south", "nor"]}, {"regex": "[a-d]{2,9}"}, {"json": SCHEMA}, {"grammar": 'start: "a" | "b" start'}]
CALL_PROMPT = [9, 10, 11, 12, 13]
CALL_WITH_IMAGES = [9, 10, [1], 11, 12, [2], 13]
CALLS = {  # of `generate`, beside the requests
    "beams": dict(num_beams=3),
    "guided beams": dict(num_beams=2, form={"regex": "[a-d]{2,9}"}, max_new_tokens=10),
    "guided": dict(form={"json": SCHEMA, "disable_any_whitespace": True}, max_new_tokens=20),
    "assisted": dict(assistant=True),
    "looked up": dict(prompt_lookup_num_tokens=3, max_new_tokens=12),
    "guided and assisted": dict(form={"choice": ["north", "south"]}, assistant=True, max_new_tokens=10),
    "with callables": dict(functions=True),
    "greedy": dict(),
}
CALLS_WITH_IMAGES = ["beams", "guided beams", "guided", "looked up", "with callables", "greedy"]


@dataclass(frozen=True)
class Job:
    """A request, when it comes and when it is aborted: both in steps, after the request before it and after itself.

    Attributes:
        images: by the token before which each stands.
    """

    prompt: tuple[int, ...]
    images: tuple[tuple[int, int], ...]
    params: SamplingParams | EmbedParams | ScoreParams | ClassifyParams
    adapter: str | None
    salt: str | bytes | None
    functions: tuple[str, ...]
    priority: int
    deadline: float | None
    wait: int
    abort_after: int | None

    def given(self, name: str) -> tuple[list[int], dict]:
        """The prompt, and what `add` is given of the request that can change its result."""
        ids, images = list(self.prompt), {}
        if name in VISION:
            row = [token if not IMAGE <= token < IMAGE + 4 else 100 for token in ids]
            for place, seed in sorted(self.images, reverse=True):
                row.insert(min(place, len(row)), [seed])
            ids, pictures = with_images(stock(name), name, row)
            images = dict(images=joined(name, [pictures])) if pictures else {}
        layer = "model.language_model.layers.1" if name in VISION else "model.layers.1"
        made = dict(
            logits_processors=[shun],
            stopping_criteria=[lambda generated: len(generated) >= len(ids) + 5],
            forward_hooks={layer: tilt},
        )
        return ids, images | {name: made[name] for name in self.functions} | dict(adapter=self.adapter, cache_salt=self.salt)


def shun(token_ids, logits):
    """Never the same token twice in a row."""
    return logits.index_fill(0, torch.tensor([token_ids[-1]]), -50.0)


def tilt(activation, positions):
    return activation * (1 + 0.01 * (positions % 3)).unsqueeze(-1)


# What there may be

prompts = st.builds(
    lambda prefix, tail: PREFIXES[prefix] + tuple(tail),
    st.integers(0, len(PREFIXES) - 1),
    st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=24),
)
images = st.lists(st.tuples(st.sampled_from([0, 20, 34, 99]), st.integers(1, 3)), max_size=2)


def mostly(usual, *others):
    return st.sampled_from([usual] * 3 + list(others))


@st.composite
def sampling(draw) -> SamplingParams:
    form = draw(mostly(None, *FORMS))
    max_tokens = draw(st.integers(1, 12))
    chosen = dict(
        n=draw(mostly(1, 2, 3)),
        temperature=draw(st.sampled_from([0.0, 0.8, 1.3])),
        top_p=draw(mostly(1.0, 0.8)),
        top_k=draw(mostly(0, 9)),
        min_p=draw(mostly(0.0, 0.05)),
        repetition_penalty=draw(mostly(1.0, 1.3)),
        presence_penalty=draw(mostly(0.0, 0.5)),
        frequency_penalty=draw(mostly(0.0, 0.4)),
        seed=draw(st.integers(0, 3)),
        max_tokens=max_tokens,
        logprobs=draw(mostly(None, 0, 3)),
        prompt_logprobs=draw(mostly(None, 1)),
        structured_outputs=form,
    )
    if form is None:  # which ends by itself, and needs the tokens that these take away
        chosen |= dict(
            logit_bias=draw(mostly(None, {70: 3.0, 71: 2.5, 72: -9.0})),
            bad_words=draw(mostly(None, ["a", "th"])),
            allowed_token_ids=draw(mostly(None, range(3, 99))),
            stop=draw(mostly(None, ["e", "ab"])),
            stop_token_ids=draw(mostly(None, [75, 90, 200])),
            min_tokens=draw(st.sampled_from([0, max_tokens // 2])),
            ignore_eos=draw(st.booleans()),
        )
    return SamplingParams(**chosen)


embedding = st.builds(
    EmbedParams,
    pooling=st.sampled_from(["mean", "last", "cls"]),
    normalize=st.booleans(),
    dimensions=st.sampled_from([None, 16]),
)
scoring = st.builds(ScoreParams, continuation=st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=9))
classifying = st.builds(ClassifyParams, activation=st.sampled_from([None, "softmax", "sigmoid"]))


@st.composite
def jobs(draw, name: str) -> Job:
    params = draw(st.one_of(*KINDS[name]))
    allowed = ["forward_hooks"]
    if isinstance(params, SamplingParams) and params.structured_outputs is None:
        allowed += ["logits_processors", "stopping_criteria"]
    adapter = draw(mostly(None, *ADAPTERS))
    return Job(
        prompt=draw(prompts),
        images=tuple(draw(images)) if name in VISION and adapter != "ia3" else (),  # which runs beside no images
        params=params,
        adapter=adapter,
        salt=draw(mostly(None, "salt", b"\0\xff")),
        functions=tuple(draw(mostly((), *[(name,) for name in allowed]))),
        priority=draw(st.integers(-1, 1)),
        deadline=draw(mostly(None, 1e4)),
        wait=draw(st.integers(0, 3)),
        abort_after=draw(mostly(None, 0, 2, 5)),
    )


engines = st.fixed_dictionaries(
    dict(
        policy=st.sampled_from(["fcfs", "priority", "fair"]),
        max_batch_tokens=st.sampled_from([256, 40, 16]),
        max_num_seqs=st.sampled_from([16, 5, 3]),
        tokens=st.sampled_from([4000, 400, 208]),  # of KV cache: room for all, for some, for little more than one
        prefix_cache=st.booleans(),
        kv_dtype=mostly(None, "int8"),
        offload=st.sampled_from([None, "1MiB"]),
        overlap=st.booleans(),
        speculation=mostly(None, "ngram", "draft"),
        by_async=mostly(False, True),
    )
)
calls = st.lists(st.sampled_from(sorted(CALLS)), max_size=3)

# What it is compared with


@functools.cache
def model(name: str):
    return hf_paged.patch(fresh(name))


@functools.cache
def adapted(name: str, adapter: str):
    """A model with an adapter, from which engines take it."""
    config, options = ADAPTERS[adapter]
    if name in VISION:  # what encodes images stays as it is
        names = ("target_modules", "feedforward_modules")
        within = {name: rf".*language_model.*\.({'|'.join(options[name])})" for name in names if name in options}
        options = options | within
    wrapped = peft.get_peft_model(fresh(name), getattr(peft, config)(**options))
    shake(wrapped, list(ADAPTERS).index(adapter))
    return wrapped.eval()


def opened(name: str, work: list[Job], draft_model=None, **config) -> Engine:
    """An engine with the adapters that the jobs have."""
    config = EngineConfig(block_size=16, **config)
    engine = Engine(model(name), tiny_tokenizer(VOCAB), config, draft_model=draft_model)
    for adapter in sorted({job.adapter for job in work} - {None}):
        info = engine.load_adapter(adapter, adapted(name, adapter))
        assert (info.apart is not None) == (adapter == "ia3")
    return engine


def fresh(name: str):
    if name == "classifier":
        torch.manual_seed(5)
        config = tiny_config("llama", vocab_size=VOCAB, num_labels=3, pad_token_id=PAD)
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    if name in VISION:
        model = tiny_model(name, text_config=dict(FAMILIES[name][1]["text_config"], vocab_size=VOCAB))
    else:
        model = tiny_model(name, vocab_size=VOCAB)
    model.generation_config.eos_token_id = EOS
    return model


@functools.cache
def draft():
    return tiny_model("llama", vocab_size=VOCAB, seed=3, num_hidden_layers=1)


@functools.cache
def assistant():
    return tiny_model("llama", vocab_size=VOCAB, seed=4, num_hidden_layers=1)


@functools.cache
def stock(name: str):
    return fresh(name)


@functools.cache
def by_stock(name: str, call: str) -> list[int]:
    return generated(name, stock(name), call)


def generated(name: str, model, call: str) -> list[int]:
    """What a call of CALLS gives."""
    row = CALL_WITH_IMAGES if name in VISION else CALL_PROMPT
    inputs = batch(stock(name), name, [row])
    start = inputs["input_ids"].shape[1]
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=PAD) | CALLS[call]
    processors = []
    if (form := options.pop("form", None)) is not None:
        processors.append(StructuredOutputsProcessor(form, tiny_tokenizer(VOCAB), model))
    if options.pop("functions", False):
        processors.append(lambda ids, scores: scores.index_fill(1, ids[0, -1:], -50.0))
        options["stopping_criteria"] = [lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= start + 4)]
    if options.pop("assistant", False):
        options["assistant_model"] = assistant()
    return model.generate(**inputs, logits_processor=processors, **options)[0].tolist()


def alone(name: str, work: list[Job], kv_dtype: str | None) -> list:
    """The results of the requests one at a time, in a roomy engine without cached prefixes."""
    results = []
    with opened(name, work, prefix_cache=False, kv_dtype=kv_dtype) as engine:
        for job in work:
            ids, options = job.given(name)
            engine.add(ids, job.params, **options)
            while engine.has_unfinished():
                results += [output for output in engine.step() if output.finished]
    return results


# The mixture


class Mixture:
    """Jobs on one engine, with all that happens to them."""

    def __init__(self, name: str, engine: Engine):
        self.name, self.engine = name, engine
        self.outputs, self.aborts, self.steps = {}, {}, 0

    def step(self) -> None:
        self.engine.step()
        self.steps += 1
        for request_id in [request_id for request_id, at in self.aborts.items() if at <= self.steps]:
            self.engine.abort(request_id)
            del self.aborts[request_id]
        self.engine.check_integrity()

    def run(self, work: list[Job]) -> list:
        for place, job in enumerate(work):
            for _ in range(job.wait):
                self.step()
            ids, options = job.given(self.name)
            self.engine.add(
                ids,
                job.params,
                request_id=str(place),
                deadline=job.deadline,
                on_output=lambda output: self.outputs.__setitem__(output.request_id, output),
                **options,
                **turn(job, self.engine),
            )
            if job.abort_after is not None:
                self.aborts[str(place)] = self.steps + job.abort_after
        while self.engine.has_unfinished():
            self.step()
        return [self.outputs[str(place)] for place in range(len(work))]


def turn(job: Job, engine: Engine) -> dict:
    """What `add` is given that the policy goes by."""
    return {
        "fcfs": {},
        "priority": {"priority": job.priority},
        "fair": {"user": f"user {job.priority}" if job.priority else None},
    }[engine.config.policy]


async def run_async(name: str, engine: Engine, work: list[Job], calls: threading.Thread) -> list:
    """The jobs at once, by AsyncEngine: one's pieces put together, the next one's last output, and so on."""

    async def run(place: int, job: Job):
        ids, given = job.given(name)
        options = dict(request_id=str(place), deadline=job.deadline, **given, **turn(job, engine))
        read = running.stream if place % 2 else running.generate
        await asyncio.sleep(0.002 * job.wait)
        whole, pieces = None, 0
        async with contextlib.aclosing(read(ids, job.params, **options)) as news:
            async for one in news:
                whole = one if whole is None or not place % 2 else whole.then(one)
                pieces += 1
                if pieces == job.abort_after:
                    await running.abort(str(place))
        return whole

    async with AsyncEngine(engine) as running:
        try:
            return await asyncio.gather(*(run(place, job) for place, job in enumerate(work)))
        finally:
            await asyncio.to_thread(calls.join)
            check_idle(engine)


def run_here(name: str, engine: Engine, work: list[Job], calls: threading.Thread) -> list:
    try:
        return Mixture(name, engine).run(work)
    finally:
        calls.join()
        check_idle(engine)


def token_bytes(name: str) -> int:
    """Of the KV cache, for a token, in float32."""
    config = stock(name).config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * config.num_key_value_heads * width * 4


def check_idle(engine: Engine) -> None:
    engine.step()
    engine.check_integrity()
    stats = engine.stats()
    assert stats["kv_bytes_in_use"] == 0 and stats["waiting"] == stats["running"] == 0


def check(name: str, work: list[Job], options: dict, beside: list[str]) -> dict:
    """The engine's stats after it."""
    config = dict(options)
    by_async = config.pop("by_async")
    memory = config.pop("tokens") * token_bytes(name)
    if name == "classifier":
        config["speculation"] = None
    if config["kv_dtype"] is not None:
        memory, beside = memory // 2, []  # stock has no such cache
    draft_model = draft() if config["speculation"] == "draft" else None
    found = []
    with opened(name, work, draft_model, kv_cache_memory=memory, **config) as engine:
        calls = threading.Thread(target=lambda: found.extend(generated(name, model(name), call) for call in beside))
        calls.start()
        run = run_here if not by_async else lambda *given: asyncio.run(run_async(*given))
        outputs = run(name, engine, work, calls)
        stats = engine.stats()
    assert found == [by_stock(name, call) for call in beside], beside
    for job, got, expected in zip(work, outputs, alone(name, work, config["kv_dtype"]), strict=True):
        assert expected.error is None, (job, expected.error)
        compare(job, got, expected)
    return stats


def compare(job: Job, got, expected) -> None:
    assert got.finished and got.error is None, (job, got.error)
    aborted = any(completion.finish_reason == "abort" for completion in got.outputs)
    assert not aborted or job.abort_after is not None, job
    if not isinstance(job.params, SamplingParams):
        assert aborted == (got.result is None), job
        if not aborted:
            assert numbers(got.result) == pytest.approx(numbers(expected.result), abs=tolerance(job)), job
        return
    for mine, whole in zip(got.outputs, expected.outputs, strict=not aborted):  # some may not have begun
        if mine.finish_reason == "abort":
            assert mine.token_ids == whole.token_ids[: len(mine.token_ids)], job
            continue
        assert shown(mine) == shown(whole), job
        assert logprobs(mine.logprobs) == pytest.approx(logprobs(whole.logprobs), abs=1e-4), job
    if not aborted:
        assert logprobs(got.prompt_logprobs) == pytest.approx(logprobs(expected.prompt_logprobs), abs=1e-4), job


def shown(completion) -> tuple:
    return completion.token_ids, completion.text, completion.finish_reason, completion.stop_reason


def logprobs(entries) -> list[float]:
    """Of all tokens that are listed, in the order of their numbers."""
    return [entry[token].logprob for entry in entries or () if entry is not None for token in sorted(entry)]


def numbers(result) -> list[float]:
    for name in ("embedding", "logits"):
        if hasattr(result, name):
            return getattr(result, name).tolist()
    return result.token_logprobs


def tolerance(job: Job) -> float:
    return 1e-5 if isinstance(job.params, EmbedParams) and job.params.normalize else 1e-4


GENERATING, CLASSIFYING = (sampling(), sampling(), embedding, scoring), (classifying, embedding)
KINDS = {"llama": GENERATING, "gemma2": GENERATING, "classifier": CLASSIFYING} | dict.fromkeys(VISION, GENERATING)
few = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def calls_of(name: str, beside: list[str]) -> list[str]:
    """Those of the calls that there are for a model."""
    return [] if name == "classifier" else [call for call in beside if name not in VISION or call in CALLS_WITH_IMAGES]


@pytest.mark.parametrize("name", KINDS)
@few
@given(data=st.data(), options=engines, beside=calls)
def test_each_gets_what_it_gets_alone(name, data, options, beside):
    work = data.draw(st.lists(jobs(name), min_size=2, max_size=8))
    check(name, work, options, calls_of(name, beside))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@settings(few, max_examples=400)
@given(data=st.data(), options=engines, beside=calls)
def test_each_gets_what_it_gets_alone_at_length(name, data, options, beside):
    work = data.draw(st.lists(jobs(name), min_size=2, max_size=14))
    check(name, work, options, calls_of(name, beside))


def crowd(name: str) -> list[Job]:
    """More than there is memory for, of every kind, all at once."""
    usual = dict(temperature=0.0, max_tokens=40, ignore_eos=True)
    kinds = [
        SamplingParams(**usual, logprobs=2),
        SamplingParams(**usual | dict(temperature=0.8), n=2, seed=1),
        SamplingParams(temperature=0.0, max_tokens=40, structured_outputs={"regex": "[a-d]{30}"}),
        ScoreParams(continuation=(60, 61, 62)),
        SamplingParams(**usual, repetition_penalty=1.3),
        EmbedParams(),
        SamplingParams(**usual, prompt_logprobs=1),
    ]
    return [
        Job(
            prompt=PREFIXES[place % 4] + (40 + place,),
            images=((99, place % 3 + 1),) if name in VISION and place % 3 else (),
            params=params,
            adapter=(None, "lora", "lora-dora", None, "rslora")[place % 5],
            salt=None,
            functions=(),
            priority=0,
            deadline=None,
            wait=0,
            abort_after=None,
        )
        for place, params in enumerate(kinds)
    ]


@pytest.mark.parametrize("name", ["llama", *VISION])
@pytest.mark.parametrize("offload", [None, "1MiB"])
def test_each_gets_what_it_gets_alone_in_a_crowd(name, offload):
    """Preempted in the middle, computed again or copied to the host's memory and back."""
    options = dict(policy="fcfs", max_batch_tokens=40, max_num_seqs=16, tokens=208, prefix_cache=True, overlap=False)
    options |= dict(speculation=None, kv_dtype=None, offload=offload, by_async=False)
    stats = check(name, crowd(name), options, [])
    assert stats["preemptions"] and (name not in VISION or stats["encoded_tokens"])
    assert offload is None or stats["swaps_out"] == stats["swaps_in"] > 0
