"""Random saving, loading, forking and going back among random traffic: everybody gets what they get alone, and no block is lost."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from hf_paged import Branch, Engine, EngineConfig, InvalidArgument, RequestOutput, SamplingParams

BLOCK, TOKENS_EACH = 16, 3 * 2 * 2 * 12 * 4  # the latter in bytes
PREFIXES = [[7] * 20, list(range(30, 94)), list(range(30, 78)) + [5] * 20]

params_strategy = st.fixed_dictionaries(
    dict(
        max_tokens=st.integers(12, 30),
        temperature=st.sampled_from([0.0, 0.9]),
        frequency_penalty=st.sampled_from([0.0, 0.8]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(1, 3),
    )
)
counts = st.integers(1, 2)
action_strategy = st.one_of(
    st.tuples(
        st.just("add"), st.integers(0, 2), st.lists(st.integers(3, 198), max_size=20), params_strategy, counts
    ),
    st.tuples(st.just("step"), st.integers(1, 9)),
    st.tuples(st.just("roll back"), st.integers(0, 9), st.floats(0, 1), st.one_of(st.none(), params_strategy)),
    st.tuples(st.just("fork"), st.integers(0, 9), st.floats(0, 1), st.one_of(st.none(), params_strategy)),
    st.tuples(st.just("save"), st.integers(0, 9), st.floats(0, 1)),
    st.tuples(st.just("load"), st.integers(0, 9), st.floats(0.3, 1)),
    st.tuples(st.just("drop"), st.integers(0, 9)),
    st.tuples(st.just("forget")),
)


BEGINNING = [("add", 1, [4, 5], dict(max_tokens=20, temperature=0.9, seed=1), 1), ("step", 6)]
WITHOUT_BLOCKS = action_strategy.filter(lambda action: action[0] in ("add", "step", "roll back", "fork"))


@functools.cache
def model(name: str):
    return tiny_model(name)


@functools.cache
def alone(name: str, prompt: tuple, kept: tuple, params: SamplingParams) -> list[list[int]]:
    """What a request gives after the tokens that came under other parameters, in an engine that knows nothing."""
    with Engine(model(name), config=EngineConfig(prefix_cache=False, block_size=BLOCK)) as engine:
        (output,) = engine.generate(Branch(prompt_token_ids=prompt, output_token_ids=kept), params)
        return [completion.token_ids for completion in output.outputs]


def sampling(given: dict, n: int = 1) -> SamplingParams:
    return SamplingParams(**given, n=n, ignore_eos=True, detokenize=False)


@dataclass
class Job:
    """A request, and how its tokens came to be: from which of them on under which parameters."""

    prompt: list[int]
    params: SamplingParams
    kept: list[int] = field(default_factory=list)
    output: RequestOutput | None = None


class Play:
    """One engine, what runs on it, and what was saved from it."""

    def __init__(self, name: str, engine: Engine):
        self.name, self.engine = name, engine
        self.jobs: dict[str, Job] = {}
        self.states, self.loaded = [], []

    def add(self, prefix, tail, given, n):
        prompt = PREFIXES[prefix] + tail
        self._start(prompt, Job(prompt, sampling(given, n)))

    def _start(self, prompt, job: Job):
        request_id = self.engine.add(prompt, job.params, on_output=lambda output: setattr(job, "output", output))
        self.jobs[request_id] = job

    def step(self, count):
        for _ in range(count):
            self.engine.step()
            self.engine.check_integrity()

    def _begun(self, pick, n=None) -> tuple[str, Job] | None:
        jobs = [(id, job) for id, job in self.jobs.items() if job.output is not None and job.output.outputs]
        jobs = [(id, job) for id, job in jobs if n is None or job.params.n == n]
        return jobs[pick % len(jobs)] if jobs else None

    def roll_back(self, pick, share, given):
        found = self._begun(pick, n=1)
        if found is None or found[1].output.finished:
            return
        request_id, job = found
        tokens = job.output.outputs[0].token_ids
        kept = max(len(job.kept), int(share * len(tokens)))  # before that it had other parameters
        params = sampling(given) if given is not None and kept < given["max_tokens"] else None
        try:
            self.engine.roll_back(request_id, len(job.prompt) + kept, params)
        except InvalidArgument:  # the step that was under way ended it
            assert job.output.finished or not self.engine.has_unfinished()
            return
        if params is not None:
            job.params, job.kept = params, tokens[:kept]
        assert job.output.outputs[0].token_ids == tokens[:kept]

    def fork(self, pick, share, given):
        found = self._begun(pick)
        if found is None:
            return
        job = found[1]
        index = pick % len(job.output.outputs)
        kept = int(share * len(job.output.outputs[index].token_ids))
        branch = self.engine.fork(job.output, len(job.prompt) + kept, index=index)
        kept = list(branch.output_token_ids)
        params = branch.params if given is None else sampling(given, 1 + pick % 2)
        if len(kept) < params.max_tokens:
            self._start(branch, Job(job.prompt, params, kept))

    def save(self, pick, share):
        found = self._begun(pick)
        if found is not None:
            job = found[1]
            length = len(job.prompt) + len(job.output.outputs[0].token_ids)
            branch = self.engine.fork(job.output, max(BLOCK, int(share * length)))
            self.states.append(self.engine.save_kv(branch))
            assert self.states[-1].token_ids == (job.prompt + job.output.outputs[0].token_ids)[: len(self.states[-1])]

    def load(self, pick, share):
        if self.states:
            state = self.states[pick % len(self.states)]
            if all(group.span is None for group in state.groups):
                state = state.truncate(max(BLOCK, int(share * len(state))))
            self.loaded.append(self.engine.load_kv(state))

    def drop(self, pick):
        if self.loaded:
            self.engine.drop_kv(self.loaded.pop(pick % len(self.loaded)))

    def forget(self):
        self.engine.reset_prefix_cache()

    def finish(self):
        while self.engine.has_unfinished():
            self.step(1)
        while self.loaded:
            self.drop(0)
        stats = self.engine.stats()
        assert stats["kv_bytes_in_use"] == stats["state_bytes_in_use"] == 0

    def compare(self):
        """When the engine is closed: a model has one at a time."""
        for job in self.jobs.values():
            found = [completion.token_ids for completion in job.output.outputs]
            assert found == alone(self.name, tuple(job.prompt), tuple(job.kept), job.params)
            assert all(tokens[: len(job.kept)] == job.kept for tokens in found)


def run(name: str, config: EngineConfig, actions: list) -> None:
    with Engine(model(name), config=config) as engine:
        play = Play(name, engine)
        for kind, *arguments in [*BEGINNING, *actions]:
            getattr(play, kind.replace(" ", "_"))(*arguments)
            engine.check_integrity()
        play.finish()
    play.compare()


def random_plays(examples: int):
    """Of one action after another, in engines of every kind."""

    def decorate(test):
        test = given(
            actions=st.lists(action_strategy, min_size=6, max_size=24),
            budget=st.sampled_from([16, 256]),
            memory_tokens=st.sampled_from([320, 4000]),
            offload=st.sampled_from([None, "1MiB"]),
            overlap=st.booleans(),
        )(test)
        quiet = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        return pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral-window"])(
            settings(max_examples=examples, **quiet)(test)
        )

    return decorate


def config_of(memory_tokens: int, budget: int, **more) -> EngineConfig:
    memory = memory_tokens * TOKENS_EACH
    return EngineConfig(block_size=BLOCK, max_batch_tokens=budget, max_num_seqs=4, kv_cache_memory=memory, **more)


@random_plays(4)
def test_random_plays(name, actions, budget, memory_tokens, offload, overlap):
    run(name, config_of(memory_tokens, budget, offload=offload, overlap=overlap), actions)


@pytest.mark.slow
@random_plays(40)
def test_many_random_plays(name, actions, budget, memory_tokens, offload, overlap):
    run(name, config_of(memory_tokens, budget, offload=offload, overlap=overlap), actions)


@pytest.mark.parametrize("name", ["jamba", "lfm2"])
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(actions=st.lists(WITHOUT_BLOCKS, min_size=4, max_size=12))
def test_models_that_keep_a_state(name, actions):
    run(name, config_of(4000, 256), actions)
