"""Outputs of a required form, checked by other programs than the one that enforces it: json, jsonschema, re, stock."""

from __future__ import annotations

import json
import re
import sys

import jsonschema
import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged import Engine, EngineConfig, InvalidArgument, SamplingParams, StructuredOutputsParams

EOS = 2
PROMPT = "Tell me"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["north", "south", "sør"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "kind", "sizes", "next"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", vocab_size=320)
    model.generation_config.eos_token_id = EOS
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(320)


@pytest.fixture(params=[{}, {"overlap": True}, {"speculation": "ngram"}], ids=["plain", "overlap", "speculation"])
def engine(model, tokenizer, request):
    with Engine(model, tokenizer, EngineConfig(max_num_seqs=8, **request.param)) as engine:
        yield engine
        assert not engine.has_unfinished()
        engine.check_integrity()


@pytest.fixture(scope="module")
def idle_engine(tokenizer):
    model = tiny_model("llama", vocab_size=320)
    model.generation_config.eos_token_id = EOS
    with Engine(model, tokenizer) as engine:
        yield engine


def params(form: dict, **more) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 400, "structured_outputs": form, **more})


def completions(engine, form: dict, **more) -> list[str]:
    outputs = engine.generate([PROMPT], params(form, **more))[0].outputs
    assert all(output.finish_reason == "stop" for output in outputs)
    return [output.text for output in outputs]


def test_json_follows_its_schema(engine):
    texts = completions(engine, {"json": SCHEMA, "disable_any_whitespace": True}, n=6, seed=3)
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
        assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False) or "\\" in text
    assert len(set(texts)) > 1


def test_any_object(engine):
    bias = {token: 4.0 for token in engine.tokenizer.encode('"}')}  # so that it ends
    for text in completions(engine, {"json_object": True}, n=3, seed=1, logit_bias=bias):
        assert isinstance(json.loads(text), dict)


def test_regular_expressions_match_all_of_the_output(engine):
    pattern = r"(\+[0-9]{2} )?[1-9][0-9]{3,6}( æ|, [a-f]{2})?"
    for text in completions(engine, {"regex": pattern}, n=8, seed=2):
        assert re.fullmatch(pattern, text)


def test_grammars(engine):
    rules = 'start: sum\nsum: term ("+" term)*\nterm: /[1-9][0-9]?/ | "(" sum ")"'
    for text in completions(engine, {"grammar": rules}, n=4, seed=5, logit_bias={EOS: 3.0}):
        assert re.fullmatch(r"[0-9+()]+", text) and eval(text) > 0


CHOICES = ["yes", "yes, of course", "no", "ni", "ja – \"sure\"\n", "日本"]


def allowed_by_stock(tokenizer, prompt_length: int):
    """What `generate` may choose so that the output is one of CHOICES: worked out from the texts of all tokens."""
    pieces = {token: tokenizer.backend_tokenizer.id_to_token(token) for token in range(3, len(tokenizer))}
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    as_bytes = {token: bytes(byte_of[char] for char in piece) for token, piece in pieces.items()}

    def allowed(_, ids):
        done = b"".join(as_bytes[token] for token in ids[prompt_length:].tolist())
        wanted = [choice.encode() for choice in CHOICES]
        tokens = [t for t, piece in as_bytes.items() if any(choice.startswith(done + piece) for choice in wanted)]
        return tokens + [EOS] if done in wanted else tokens

    return allowed


@pytest.mark.parametrize("question", ["a", "What?", "the rain in", "zz9", "Tell me more"])
def test_choices_are_those_of_stock_generate_under_the_same_restriction(question):
    """With a token for every byte: of the ways to write a text that is certain, a form leaves only the usual one."""
    model, tokenizer = tiny_model("llama", vocab_size=259), tiny_tokenizer(259)
    model.generation_config.eos_token_id = EOS
    with Engine(model, tokenizer) as engine:
        output = engine.generate([question], params({"choice": CHOICES}, temperature=0))[0]
    ids = torch.tensor([output.prompt_token_ids])
    rule = allowed_by_stock(tokenizer, ids.shape[1])
    stock = model.generate(ids, max_new_tokens=40, do_sample=False, prefix_allowed_tokens_fn=rule)
    assert stock[0, ids.shape[1] :].tolist() == output.outputs[0].token_ids
    assert output.outputs[0].text in CHOICES


def test_the_others_in_a_batch_do_not_notice(engine):
    free = SamplingParams(max_tokens=30, seed=7, logprobs=1)
    alone = engine.generate([PROMPT], free)[0].outputs[0]
    form = params({"json": SCHEMA}, seed=4)
    first = engine.generate([PROMPT], form)[0].outputs[0].token_ids
    together = engine.generate([PROMPT] * 3, [form, free, params({"regex": "[ab]{5}c"})])
    assert together[1].outputs[0].token_ids == alone.token_ids
    assert together[1].outputs[0].logprobs == alone.logprobs
    assert together[0].outputs[0].token_ids == first
    assert re.fullmatch("[ab]{5}c", together[2].outputs[0].text)


def test_sampling_on_the_device_keeps_to_the_form(tokenizer):
    """In Triton's interpreter, beside a request without a form."""
    import triton_interpreter  # noqa: F401  (applies the interpreter's repairs)

    model = tiny_model("llama", vocab_size=320, num_hidden_layers=1)
    model.generation_config.eos_token_id = EOS
    requests = [params({"choice": ["xy", "no"]}, seed=1), SamplingParams(max_tokens=3, seed=2)]
    tokens = []
    for backend in ("auto", "triton"):
        with Engine(model, tokenizer, EngineConfig(attention_backend=backend, fuse=False)) as engine:
            outputs = engine.generate([PROMPT] * 2, requests)
            assert outputs[0].outputs[0].text in ("xy", "no")
            tokens.append([output.outputs[0].token_ids for output in outputs])
    assert tokens[0] == tokens[1]


def test_forms_survive_preemption(model, tokenizer):
    forms = [params({"json": SCHEMA}, seed=seed) for seed in range(6)]
    with Engine(model, tokenizer, EngineConfig(block_size=16)) as engine:
        expected = [output.outputs[0].token_ids for output in engine.generate([PROMPT] * 6, forms)]
    with Engine(model, tokenizer, EngineConfig(block_size=16, kv_cache_memory="128KiB", max_model_len=160)) as engine:
        shorter = [params({"json": SCHEMA}, seed=seed, max_tokens=None) for seed in range(6)]
        outputs = engine.generate([PROMPT] * 6, shorter)
        assert engine.stats()["preemptions"] > 0
    for output, whole in zip(outputs, expected):
        assert output.outputs[0].token_ids == whole[: len(output.outputs[0].token_ids)]


def test_an_output_that_cannot_go_on_ends_by_itself(engine):
    """A processor leaves only a token that the form forbids; the neighbour goes on."""

    def insists(token_ids, logits):
        return torch.full_like(logits, -torch.inf).index_copy(0, torch.tensor([40]), logits[40:41])

    bad = engine.add(PROMPT, params({"choice": ["xyz"]}), logits_processors=[insists])
    good = engine.add(PROMPT, params({"choice": ["xyz"]}))
    results = {}
    while engine.has_unfinished():
        results.update({output.request_id: output for output in engine.step() if output.finished})
    assert "-inf" in str(results[bad].error)
    assert results[good].error is None and results[good].outputs[0].text == "xyz"


def test_a_form_that_takes_too_much_work_ends_its_own_request(engine):
    bad = engine.add(PROMPT, params({"regex": "x{3000}{3000}"}))
    good = engine.add(PROMPT, params({"choice": ["xyz"]}))
    results = {}
    while engine.has_unfinished():
        results.update({output.request_id: output for output in engine.step() if output.finished})
    assert "structured_outputs: lexer error" in str(results[bad].error)
    assert results[good].error is None and results[good].outputs[0].text == "xyz"


@pytest.mark.parametrize(
    "form, words",
    [
        ({}, "exactly one of json"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice"),
        ({"json": "{"}, "json is no JSON"),
        ({"json": 3}, "json must be a schema"),
        ({"json": {"type": "nonsense"}}, "structured_outputs: json: "),
        ({"json": {"type": "string", "nonsense": {"$ref": "#/nowhere"}, "pattern": "("}}, "structured_outputs: json: "),
        ({"json": {"$ref": "http://example.com/schema"}}, "structured_outputs: json: "),
        ({"regex": "(a"}, "structured_outputs: regex: "),
        ({"regex": "(a)\\1"}, "structured_outputs: regex: "),
        ({"json": {"$ref": "#"}}, "structured_outputs: json: no text has this form"),
        ({"regex": r"a[^\s\S]"}, "structured_outputs: regex: no text has this form"),
        ({"json": {"not": {"type": "string"}}}, 'structured_outputs: json: Unimplemented keys: ["not"]'),
        ({"grammar": "start: nothing"}, "structured_outputs: grammar: "),
        ({"choice": []}, "choice must hold"),
        ({"choice": "yes"}, "choice must be a list"),
        ({"choice": ["a"] * 5000}, "at most 4096"),
        ({"regex": "a" * 300_000}, "at most 262144 characters"),
        ({"regex": "a", "disable_any_whitespace": True}, "whitespace is a matter of json"),
        ({"json_object": "yes"}, "json_object must be True"),
        ({"regular": "a"}, "no field 'regular'"),
    ],
)
def test_bad_forms_are_refused_by_name(idle_engine, form, words):
    with pytest.raises(InvalidArgument, match=re.escape(words)):
        idle_engine.add(PROMPT, params(form))
    assert not idle_engine.has_unfinished()


def test_what_a_form_needs(model, tokenizer, monkeypatch):
    with pytest.raises(InvalidArgument, match="ignore_eos"):
        params({"regex": "a"}, ignore_eos=True)
    with pytest.raises(InvalidArgument, match="must be a StructuredOutputsParams"):
        SamplingParams(structured_outputs="json")
    form = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    with Engine(model) as engine, pytest.raises(InvalidArgument, match="fast tokenizer"):
        engine.add([5, 6], form)
    with Engine(tiny_model("llama", vocab_size=320), tokenizer) as engine:
        with pytest.raises(InvalidArgument, match="end-of-sequence token"):
            engine.add([5, 6], form)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with Engine(model, tokenizer) as engine, pytest.raises(InvalidArgument, match="pip install"):
        engine.add([5, 6], form)
