"""What a request must not be: each is refused by name, and who runs beside it notices nothing."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged import (
    ClassifyParams,
    EmbedParams,
    Engine,
    EngineConfig,
    InvalidArgument,
    SamplingParams,
    ScoreParams,
)

VOCAB = 320
NAN, INF = math.nan, math.inf
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
BESIDE = list(range(30, 70))

# Numbers of SamplingParams that no field takes, and each field's own limits
NUMBERS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"),
)
NO_NUMBERS = [NAN, INF, -INF, "1", True, [1], {}, 1j, b"1", torch.ones(2), numpy.ones(2)]
OUT_OF_RANGE = dict(
    n=[0, -1, 10**9, 1.0],
    temperature=[-0.1, 1e-30, 10**400],
    top_p=[-0.1, 1.1],
    top_k=[-2, 0.5],
    min_p=[-0.1, 1.5],
    repetition_penalty=[0, -1, 1e9],
    presence_penalty=[2.1, -2.1],
    frequency_penalty=[2.1, -2.1],
    seed=[2**64, -(2**63) - 1, 0.5],
    max_tokens=[0, -1, 1.5],
    min_tokens=[-1, 17, 0.5],
    logprobs=[-1, 10**6, 0.5],
    prompt_logprobs=[-1, 10**6, 0.5],
)
FIELDS = dict(
    stop=[3, [3], [""], ["x"] * 100, ["x" * 20_000], {"a": 1}, b"end"],
    stop_token_ids=["5", 5, [-1], [1.5], [True], [NAN], [2**70], {5: 1}],
    bad_words=["word", [""], [5], ["x"] * 2000],
    allowed_token_ids=[[], "5", [-1], [NAN], [None]],
    logit_bias=[[5], {5: NAN}, {5: INF}, {5: "1"}, {-1: 1.0}, {"5": 1.0}, {1.5: 1.0}, dict.fromkeys(range(5000), 1.0)],
    keep_special_token_ids=["5", [-1], [0.5]],
    ignore_eos=[1, "yes", None],
    skip_special_tokens=[1, None],
    spaces_between_special_tokens=[0],
    include_stop_str_in_output=["x"],
    detokenize=[None],
    structured_outputs=["json", 3, {}, {"regex": "a" * 300_000}, {"choice": ["a"] * 5000}, {"json": {"a": {1, 2}}}],
)
PARAMS = [(name, value) for name in NUMBERS for value in NO_NUMBERS + OUT_OF_RANGE[name]]
PARAMS += [(name, value) for name, values in FIELDS.items() for value in values]


@pytest.mark.parametrize("name", dict(PARAMS))
def test_sampling_params_name_the_field(name):
    for value in (value for field, value in PARAMS if field == name):
        with pytest.raises(InvalidArgument, match=name):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("kind", [SamplingParams, EmbedParams, ClassifyParams, ScoreParams])
def test_unknown_fields_are_named(kind):
    with pytest.raises(TypeError, match="temprature"):
        kind(temprature=0.5)


TASKS = [
    *((EmbedParams, "dimensions", value) for value in (0, -1, 1.0, NAN, INF, "8", True, [8], 2**80)),
    *((EmbedParams, "pooling", value) for value in ("max", 1, True, ["mean"], {}, NAN)),
    *((EmbedParams, "normalize", value) for value in (1, None, "yes", NAN)),
    *((ClassifyParams, "activation", value) for value in ("relu", 1, ["softmax"], {}, NAN)),
    *((ScoreParams, "continuation", value) for value in ("", [], (), 5, None, NAN, torch.zeros(0), torch.tensor(3))),
    *((ScoreParams, "continuation", value) for value in ([5, "a"], [NAN], [True], [-1], [VOCAB], [2**80], {5: 6}, b"ab")),
    *((ScoreParams, "continuation", value) for value in (numpy.ones((2, 2), dtype=int), [None])),
]

PROMPTS = {
    "empty list": [],
    "empty text": "",
    "empty tensor": torch.zeros(0, dtype=torch.long),
    "none": None,
    "number": 5,
    "negative": [5, -1],
    "beyond": [5, VOCAB],
    "huge": [5, 2**80],
    "float": [5, 6.0],
    "nan": [5, NAN],
    "bool": [5, True],
    "none inside": [5, None],
    "text inside": [5, "a"],
    "texts": ["a", "b"],
    "nested": [[5]],
    "float tensor": torch.ones(3),
    "two rows": torch.ones(2, 3, dtype=torch.long),
    "number tensor": torch.tensor(5),
    "bool array": numpy.ones(3, dtype=bool),
    "bytes": b"abc",
    "dict": {5: 6},
    "set": {5, 6},
    "messages without roles": [{"content": "x"}],
    "messages and ids": [{"role": "user", "content": "x"}, 5],
    "pair": ("a", "b"),
    "too long": [5] * 3000,
}

OPTIONS = [
    *(("request_id", value) for value in (5, b"a", ["a"], True)),
    *(("priority", value) for value in ("high", 1.0, NAN, True, None)),
    *(("deadline", value) for value in (0, -1, NAN, INF, "5", True, [5], 10**400)),
    *(("user", value) for value in ("nobody is asked for", 5, b"a", True, ["a"])),
    *(("cache_salt", value) for value in (5, 1.5, True, ["a"], {"a": 1}, "s" * 10**6, b"s" * 10**6)),
    *(("adapter", value) for value in ("nobody", "", 5, True, ["lora"], b"lora", "a" * 10**5)),
    *(("logits_processors", value) for value in (5, [5], ["f"], print)),
    *(("stopping_criteria", value) for value in (5, [None], print)),
    *(("forward_hooks", value) for value in (5, [print], {"nowhere": print}, {"model.layers.0": 5}, {5: print})),
    ("on_output", 5),
    *(("params", value) for value in ({"n": 2}, "greedy", 5, SamplingParams, EngineConfig())),
    *(("params", SamplingParams(stop_token_ids=[value])) for value in (VOCAB, 2**40)),
    ("params", SamplingParams(allowed_token_ids=[VOCAB])),
    ("params", SamplingParams(logit_bias={VOCAB: 1.0})),
    ("params", SamplingParams(n=5000)),
    ("params", EmbedParams(dimensions=10**6)),
    ("params", ClassifyParams()),
    ("params", SamplingParams(structured_outputs={"regex": "(a"})),
    ("params", SamplingParams(structured_outputs={"json": {"type": "nonsense"}})),
    ("params", SamplingParams(structured_outputs={"json": {"allOf": [{"$ref": "#"}]}})),
]


@pytest.fixture(scope="module")
def engine():
    model = tiny_model("llama", vocab_size=VOCAB)
    model.generation_config.eos_token_id = 2
    with Engine(model, tiny_tokenizer(VOCAB), EngineConfig(block_size=16, max_num_seqs=8, policy="priority")) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine):
    (output,) = engine.generate([BESIDE], GREEDY)
    return output.outputs[0].token_ids, output.outputs[0].logprobs


@pytest.fixture
def beside(engine, expected):
    """A request that is half done while the test refuses others."""
    state = engine.submit(BESIDE, GREEDY)
    for _ in range(3):
        engine.step()
    yield
    stats = engine.stats()
    assert (stats["running"], stats["waiting"]) == (1, 0), "a request that was refused is in the queue"
    while engine.has_unfinished():
        engine.step()
    assert (state.output.outputs[0].token_ids, state.output.outputs[0].logprobs) == expected
    engine.check_integrity()
    assert engine.stats()["kv_bytes_in_use"] == 0


@pytest.mark.parametrize("place", range(len(TASKS)))
def test_tasks_name_the_field(place, engine, beside):
    kind, name, value = TASKS[place]
    with pytest.raises(InvalidArgument, match=name):
        engine.add([5, 6], kind(**{name: value}))


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("params", [GREEDY, EmbedParams(), ScoreParams(continuation=[5])], ids=["tokens", "embed", "score"])
def test_prompts(case, params, engine, beside):
    with pytest.raises(InvalidArgument, match="prompt"):
        engine.add(PROMPTS[case], params)


@pytest.mark.parametrize("place", range(len(OPTIONS)))
def test_options_name_the_argument(place, engine, beside):
    name, value = OPTIONS[place]
    words = name
    if name == "params" and not isinstance(value, type) and hasattr(value, "__dataclass_fields__"):
        words = "params|stop_token_ids|allowed_token_ids|logit_bias|structured_outputs|dimensions|n |head"
    with pytest.raises(InvalidArgument, match=words):
        engine.add([5, 6], **{name: value})


def nested(depth: int) -> str:
    return '{"type": "array", "items": ' * depth + '{"type": "null"}' + "}" * depth


ABSURD = {
    "brackets": {"grammar": "start: " + "(" * 20_000},
    "nested brackets": {"grammar": "start: " + "(" * 5000 + '"x"' + ")" * 5000},
    "nested schema": {"json": nested(5000)},
    "many values": {"json": {"enum": [str(number) for number in range(20_000)]}},
    "counted": {"regex": "x{1000000000}"},
    "counted twice": {"regex": "x{3000}{3000}"},
    "two to the 200": {"grammar": "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(200)) + '\na200: "x"'},
    "more than may be sent": {"json": {"description": "x" * 300_000}},
}


@pytest.mark.parametrize("case", ABSURD)
def test_a_grammar_of_absurd_size_is_refused_or_ends_its_own_request(case, engine, beside):
    try:
        state = engine.submit([5, 6], SamplingParams(max_tokens=4, structured_outputs=ABSURD[case]))
    except InvalidArgument as error:
        assert "structured_outputs" in str(error) and len(str(error)) < 500
        return
    while not state.output.finished:
        engine.step()
    assert "InvalidArgument: structured_outputs" in str(state.output.error)


def test_a_salt_is_met_by_nobody_who_does_not_know_it(engine):
    """What another request's cached prefix would say of its prompt: how many of its own tokens were there already."""
    secret = list(range(100, 164))

    def cached(salt) -> int:
        state = engine.submit(secret, SamplingParams(max_tokens=1), cache_salt=salt)
        while engine.has_unfinished():
            engine.step()
        return state.output.metrics.num_cached_tokens

    assert cached("hers") == 0 and cached("hers") == 48
    tokens = b"".join(token.to_bytes(8, "little") for token in secret[:16])
    for forged in (None, "", b"", b"hers", "Hers", "hers\0", "\1hers", b"\1hers", b"hers" + tokens, "hers" * 2):
        assert cached(forged) == 0, forged


EMBEDS = {
    "width": (torch.zeros(2, 3, 49), {}, r"inputs_embeds must be \[B, T, 48\]"),
    "flat": (torch.zeros(2, 1, 3, 48), {}, r"inputs_embeds must be floats \[B, T, H\]"),
    "integers": (torch.zeros(2, 3, 48, dtype=torch.long), {}, r"inputs_embeds must be floats .* torch.int64"),
    "nobody": (torch.zeros(0, 3, 48), {}, "inputs_embeds has no rows"),
    "no tokens": (torch.zeros(2, 0, 48), {}, "row 0 is empty"),
    "rows": (torch.zeros(2, 3, 48), {"input_ids": torch.ones(3, 3, dtype=torch.long)}, "inputs_embeds has 2 rows"),
    "mask": (torch.zeros(2, 3, 48), {"attention_mask": torch.tensor([[0, 1], [1, 1]])}, r"_mask \[2, 2\] does not fit"),
    "ones": (torch.zeros(2, 3, 48), {"attention_mask": torch.ones(2, 2)}, r"(_mask|position_ids) \[2, 2\] does not fit"),
}


@pytest.mark.parametrize("case", EMBEDS)
def test_embeddings_of_a_wrong_shape(case, engine, beside):
    embeds, others, message = EMBEDS[case]
    with pytest.raises(InvalidArgument, match=message):
        engine.model.module.generate(inputs_embeds=embeds, **others, max_new_tokens=4)


@pytest.mark.parametrize("ids", [torch.tensor([5, 6]), numpy.array([5, 6]), (5, 6), [numpy.int64(5), numpy.int32(6)]])
def test_token_ids_of_every_integer_type_are_taken(ids, engine):
    assert engine.generate([ids], GREEDY)[0].outputs[0].token_ids == engine.generate([[5, 6]], GREEDY)[0].outputs[0].token_ids
