"""Jumping ahead where a form leaves no choice: the output is that of a step for each token, in fewer steps."""

from __future__ import annotations

import json
import re
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged import Engine, EngineConfig, SamplingParams, StructuredOutputsParams
from hf_paged.engine.jump import JumpAhead
from hf_paged.runtime.constraint import Constraints

EOS, VOCAB = 2, 320
PROMPT = "Tell me"
SCHEMA = {
    "type": "object",
    "properties": {
        "name_of_the_nearest_city": {"type": "string", "maxLength": 5},
        "direction_of_the_wind": {"enum": ["north by northwest", "north by north", "south", "sør"]},
        "temperatures": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 2},
    },
    "required": ["name_of_the_nearest_city", "direction_of_the_wind", "temperatures"],
    "additionalProperties": False,
}
JSON = {"json": SCHEMA, "disable_any_whitespace": True}


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", vocab_size=VOCAB)
    model.generation_config.eos_token_id = EOS
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(VOCAB)


def params(form: dict | None = JSON, **more) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 300, "structured_outputs": form, **more})


@pytest.fixture
def compared(tokenizer, monkeypatch):
    """Runs requests with and without jumping; asserts that all told of them is equal. Returns outputs and both stats."""

    def run(model, requests: list[SamplingParams], config: EngineConfig | None = None, **options):
        told, all_stats = [], []
        for jumping in (True, False):
            with monkeypatch.context() as patch:
                if not jumping:
                    patch.setattr(JumpAhead, "extend", lambda self, plan, scheduler: plan)
                with Engine(model, tokenizer, config or EngineConfig()) as engine:
                    results = {}
                    for number, request in enumerate(requests):
                        engine.add(PROMPT, request, request_id=str(number), **options)
                    while engine.has_unfinished():
                        results |= {output.request_id: output for output in engine.step() if output.finished}
                        engine.check_integrity()
                    all_stats.append(engine.stats())
                told.append([results[str(number)] for number in range(len(requests))])
        described = [
            [
                [(one.token_ids, one.text, one.logprobs, one.finish_reason, one.stop_reason) for one in output.outputs]
                + [str(output.error).replace(output.request_id, "")]
                for output in outputs
            ]
            for outputs in told
        ]
        assert described[0] == described[1]
        assert all_stats[1]["forced_tokens"] == 0
        return told[0], *all_stats

    return run


@pytest.mark.parametrize("config", [{}, {"overlap": True}, {"speculation": "ngram"}, {"max_batch_tokens": 24}], ids=str)
def test_the_output_is_the_same_in_fewer_steps(model, compared, config):
    requests = [
        params(temperature=0, logprobs=2),
        params(seed=1, n=3, logprobs=0),
        params(seed=2, top_p=0.9, repetition_penalty=1.2),
        params({"choice": ["a long answer that is certain", "a long answer that is not"]}, seed=3),
        params(None, seed=4, max_tokens=40, logprobs=1),
    ]
    outputs, jumping, one_by_one = compared(model, requests, EngineConfig(max_num_seqs=8, **config))
    for output in outputs[:3]:
        for completion in output.outputs:
            assert json.loads(completion.text).keys() == SCHEMA["properties"].keys()
    assert jumping["steps"] < 0.7 * one_by_one["steps"]
    assert jumping["forced_tokens"] > 200
    if "speculation" not in config:
        assert jumping["draft_tokens"] == 0 and jumping["acceptance_rate"] is None


@pytest.mark.parametrize(
    "more",
    [
        *({"max_tokens": count} for count in (1, 2, 5, 9, 23)),
        {"stop": ["nearest"]},
        {"stop": ["_of_"], "include_stop_str_in_output": True, "min_tokens": 12},
        {"stop_token_ids": [tiny_tokenizer(VOCAB).encode("k", add_special_tokens=False)[0]]},
        {"min_tokens": 200},
        {"bad_words": ["city"]},
        {"allowed_token_ids": list(range(3, 300))},
        {"logit_bias": {4: -100.0}},
    ],
    ids=str,
)
def test_outputs_end_where_they_did(model, compared, more):
    compared(model, [params(temperature=0, logprobs=0, **more), params(seed=5, **more)])


def test_a_criterion_ends_it_within_what_is_certain(model, compared):
    outputs, *_ = compared(model, [params(temperature=0)], stopping_criteria=[lambda token_ids: len(token_ids) >= 20])
    assert len(outputs[0].prompt_token_ids) + len(outputs[0].outputs[0].token_ids) == 20


def test_a_processor_sees_every_token_before_the_next(model, compared):
    lengths: list[int] = []

    def sees(token_ids, logits):
        lengths.append(len(token_ids))
        return logits

    compared(model, [params(temperature=0)], logits_processors=[sees])
    half = len(lengths) // 2
    assert lengths[:half] == lengths[half:] == list(range(lengths[0], lengths[0] + half))


def test_scarce_blocks(model, compared):
    config = EngineConfig(block_size=16, kv_cache_memory="128KiB", max_model_len=160)
    _, jumping, _ = compared(model, [params(seed=seed, max_tokens=140) for seed in range(6)], config)
    assert jumping["preemptions"] > 0 and jumping["forced_tokens"] > 0


def test_models_that_keep_a_state_take_a_step_for_each_token(compared):
    model = tiny_model("lfm2", vocab_size=VOCAB)
    model.generation_config.eos_token_id = EOS
    _, jumping, _ = compared(model, [params(temperature=0)])
    assert jumping["forced_tokens"] == 0


class Dying:
    """A matcher whose code fails after so many masks."""

    def __init__(self, matcher, masks: int, error: BaseException):
        self._matcher, self._left, self._error = matcher, masks, error

    def __getattr__(self, name: str):
        return getattr(self._matcher, name)

    def deep_copy(self):
        return Dying(self._matcher.deep_copy(), self._left, self._error)

    def unsafe_compute_mask_ptr(self, *where):
        if not self._left:
            raise self._error
        self._left -= 1
        return self._matcher.unsafe_compute_mask_ptr(*where)


class PanicException(BaseException):
    """As Rust's."""


@pytest.mark.parametrize("error", [RuntimeError("out of cheese"), PanicException("unreachable")])
@pytest.mark.parametrize("masks", [0, 4, 30])
@pytest.mark.parametrize("speculation", [None, "ngram"])
def test_a_grammar_that_dies_ends_its_own_request_only(model, tokenizer, error, masks, speculation):
    with Engine(model, tokenizer, EngineConfig(speculation=speculation)) as engine:
        alone = engine.generate([PROMPT], params(seed=7))[0].outputs[0].token_ids
        results = {}
        state = engine.prepare(PROMPT, params(seed=8), request_id="dies")
        constraint = state.constraint.fork()
        constraint._matcher = Dying(constraint._matcher, masks, error)
        state.constraint = constraint
        engine.admit(state)
        engine.add(PROMPT, params(seed=7), request_id="lives")
        while engine.has_unfinished():
            results |= {output.request_id: output for output in engine.step() if output.finished}
            engine.check_integrity()
        assert "structured_outputs: the form cannot be followed" in str(results["dies"].error)
        assert results["lives"].error is None and results["lives"].outputs[0].token_ids == alone


FORMS = [
    JSON,
    {"json": SCHEMA},
    {"json": {"type": "array", "items": {"const": {"aa": [1, 2, None]}}, "minItems": 1, "maxItems": 3}},
    {"regex": "(north|north-)?west(ern)?( [0-9]{2}){2} end"},
    {"choice": ["a", "ab", "abc – certain", "日本語"]},
    {"grammar": 'start: "BEGIN " word+ " END"\nword: "in" | "inn" | /[xy]{3}/'},
]


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.sampled_from(range(len(FORMS))), st.integers(0, 2**32))
def test_what_is_forced_is_all_that_is_allowed(which, seed):
    """Along random outputs, asked in any order, and of forks."""
    random = Random(seed)
    root = Constraints(tiny_tokenizer(VOCAB), VOCAB).compile(StructuredOutputsParams(**FORMS[which]), frozenset([EOS]))
    plain, jumping, output = root.fork(), root.fork(), []
    for _ in range(60):
        most = random.choice([0, 1, 3, 50])
        forced = jumping.forced(output, most)
        expected: list[int] = []
        while len(expected) < most:
            allowed = plain.allowed(output + expected).nonzero().flatten().tolist()
            if len(allowed) > 1 or allowed[0] == EOS:
                break
            expected += allowed
        assert forced == expected
        if random.random() < 0.3:
            jumping = jumping.fork()
        for count in random.sample(range(len(forced) + 1), len(forced) + 1):
            ahead = output + forced[:count]
            assert jumping.allowed(ahead).tolist() == plain.allowed(ahead).tolist()
        output = output + forced[: random.randint(0, len(forced))]
        allowed = plain.allowed(output).nonzero().flatten().tolist()
        token = random.choice(allowed)
        if token == EOS:
            break
        output = [*output, token]


def test_texts_are_of_their_form(model, tokenizer):
    with Engine(model, tokenizer) as engine:
        for form, pattern in ((FORMS[3], FORMS[3]["regex"]), (FORMS[5], "BEGIN (in|inn|[xy]{3})+ END")):
            for completion in engine.generate([PROMPT], params(form, n=4, seed=1, logit_bias={EOS: 5.0}))[0].outputs:
                assert re.fullmatch(pattern, completion.text)
