"""Outputs of a required form from `generate`, by every decoding method, as stock gives them; and the engine's."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import LogitsProcessor

import hf_paged
from hf_paged import (
    Engine,
    EngineConfig,
    InvalidArgument,
    SamplingParams,
    StructuredOutputsParams,
    StructuredOutputsProcessor,
)
from hf_paged.runtime.constraint import Constraints

VOCAB, EOS, PAD = 320, 2, 0
SCHEMA = {
    "type": "object",
    "properties": {"wind": {"enum": ["north", "south"]}, "degrees": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["wind", "degrees"],
    "additionalProperties": False,
}
FORMS = {
    "json": ({"json": SCHEMA, "disable_any_whitespace": True}, r'\{"wind":"(north|south)","degrees":\d{1,2}\}'),
    "regex": ({"regex": "[a-d]{3,9}( [0-9]{2})?"}, "[a-d]{3,9}( [0-9]{2})?"),
    "choice": ({"choice": ["north", "northern", "south"]}, "north|northern|south"),
    "certain": ({"choice": ["xy"]}, "xy"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(VOCAB)


@pytest.fixture(scope="module")
def stock():
    return model()


@pytest.fixture(scope="module")
def patched():
    return hf_paged.patch(model())


def model(**changes):
    made = tiny_model("llama", vocab_size=VOCAB, **changes)
    made.generation_config.eos_token_id = EOS
    made.generation_config.pad_token_id = PAD
    return made


class FromScratch(LogitsProcessor):
    """The same, knowing nothing but the form: every row's output is followed from its beginning at every step."""

    def __init__(self, form: dict, tokenizer, width: int):
        compiled = Constraints(tokenizer, VOCAB).compile(StructuredOutputsParams(**form), frozenset([EOS]))
        self.form, self.width = compiled, width

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, ids in enumerate(input_ids[:, self.width :].tolist()):
            if EOS in ids:
                continue
            allowed = self.form.fork().allowed(ids, guessed=len(ids))
            scores[row, torch.ones(VOCAB, dtype=bool) if allowed is None else ~allowed] = -torch.inf
        return scores


def inputs(*lengths: int) -> dict:
    width = max(lengths)
    draw = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=draw)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    return dict(input_ids=ids.masked_fill(mask == 0, PAD), attention_mask=mask)


METHODS = {
    "greedy": (inputs(5), {}),
    "greedy batch": (inputs(3, 9, 6), {}),
    "sampled": (inputs(6), dict(do_sample=True, top_k=0)),
    "sampled, warped": (inputs(6), dict(do_sample=True, temperature=1.3, top_p=0.9)),
    "beams": (inputs(7), dict(num_beams=4)),
    "beams of a batch": (inputs(4, 8), dict(num_beams=3, num_return_sequences=2, length_penalty=1.5)),
    "more beams than ways": (inputs(7), dict(num_beams=6, num_return_sequences=6)),
    "sampled beams": (inputs(7), dict(num_beams=3, do_sample=True, top_k=0)),
    "early stopping": (inputs(7), dict(num_beams=3, early_stopping=True)),
    "prompt lookup": (inputs(9), dict(prompt_lookup_num_tokens=4)),
    "assistant": (inputs(6), dict(assistant=True)),
    "penalty": (inputs(6), dict(repetition_penalty=1.3)),
    "scores": (inputs(6), dict(return_dict_in_generate=True, output_scores=True, num_beams=2)),
}


def generate(model, processor, method: str):
    batch, options = METHODS[method]
    options = dict(options)
    if options.pop("assistant", False):
        options["assistant_model"] = tiny_model("llama", vocab_size=VOCAB, seed=3, num_hidden_layers=1)
    torch.manual_seed(7)
    result = model.generate(**batch, **{"do_sample": False, "max_new_tokens": 60} | options, logits_processor=[processor])
    return getattr(result, "sequences", result), getattr(result, "sequences_scores", None)


@pytest.mark.parametrize(
    "method, name",
    [(method, name) for method in METHODS for name in ("json", "choice")]
    + [(method, name) for method in ("beams", "more beams than ways", "sampled") for name in ("regex", "certain")],
)
def test_every_method_gives_stocks_outputs_of_that_form(stock, patched, tokenizer, method, name):
    form, pattern = FORMS[name]
    width = METHODS[method][0]["input_ids"].shape[1]
    expected, expected_scores = generate(stock, FromScratch(form, tokenizer, width), method)
    by_stock, _ = generate(stock, StructuredOutputsProcessor(form, tokenizer, stock), method)
    tokens, scores = generate(patched, StructuredOutputsProcessor(form, tokenizer, patched), method)
    assert by_stock.tolist() == expected.tolist() == tokens.tolist()
    if scores is not None:
        assert torch.allclose(scores, expected_scores, rtol=1e-5, atol=1e-4)
    if method != "more beams than ways":  # the last of which are none
        for text in tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True):
            assert re.fullmatch(pattern, text), text
    hf_paged.engine_of(patched).check_integrity()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("speculation", [None, "ngram", "draft"])
def test_the_engine_gives_what_guided_generate_gives(stock, tokenizer, name, speculation):
    """The same greedy tokens and log-probabilities, whatever is guessed, of `n` completions, too."""
    form, _ = FORMS[name]
    batch = inputs(9)
    processor = FromScratch(form, tokenizer, 9)
    shown = dict(return_dict_in_generate=True, output_logits=True)
    expected = stock.generate(**batch, do_sample=False, max_new_tokens=60, logits_processor=[processor], **shown)
    tokens = expected.sequences[0, 9:].tolist()
    logprobs = torch.stack(expected.logits)[:, 0].log_softmax(-1)[range(len(tokens)), tokens].tolist()
    draft = tiny_model("llama", vocab_size=VOCAB, seed=3, num_hidden_layers=1) if speculation == "draft" else None
    params = SamplingParams(temperature=0, n=2, logprobs=1, max_tokens=60, structured_outputs=form)
    with Engine(model(), tokenizer, EngineConfig(speculation=speculation), draft_model=draft) as engine:
        outputs = engine.generate([batch["input_ids"][0].tolist()], params)[0].outputs
    for output in outputs:
        assert output.token_ids == tokens
        got = [entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True)]
        assert got == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("speculation", ["ngram", "draft"])
def test_samples_are_those_without_guesses(tokenizer, speculation):
    form, pattern = FORMS["regex"]
    draft = tiny_model("llama", vocab_size=VOCAB, seed=3, num_hidden_layers=1) if speculation == "draft" else None
    params = [SamplingParams(seed=seed, n=3, max_tokens=40, logprobs=0, structured_outputs=form) for seed in range(4)]
    found = []
    for config in ({}, {"speculation": speculation}):
        with Engine(model(), tokenizer, EngineConfig(**config), draft_model=draft if config else None) as engine:
            outputs = engine.generate(["a b c a b c a b"] * 4, params)
            found.append([[(o.token_ids, o.logprobs) for o in output.outputs] for output in outputs])
            assert all(re.fullmatch(pattern, o.text) for output in outputs for o in output.outputs)
    assert found[0] == found[1]


def test_rows_of_generate_jump_ahead_too(tokenizer):
    patched = hf_paged.patch(model())
    processor = StructuredOutputsProcessor(FORMS["json"][0], tokenizer, patched)
    patched.generate(**inputs(5, 8), do_sample=False, max_new_tokens=60, logits_processor=[processor])
    stats = hf_paged.engine_of(patched).stats()
    assert stats["forced_tokens"] > stats["steps"]


def test_one_processor_is_for_one_call(stock, patched, tokenizer):
    for one in (stock, patched):
        processor = StructuredOutputsProcessor(FORMS["choice"][0], tokenizer, one)
        one.generate(**inputs(5), do_sample=False, num_beams=2, max_new_tokens=9, logits_processor=[processor])
        with pytest.raises(InvalidArgument, match="good for one call"):
            one.generate(**inputs(9), do_sample=False, num_beams=2, max_new_tokens=9, logits_processor=[processor])


def test_what_is_wrong_with_a_form_shows_when_the_processor_is_made(stock, tokenizer):
    wrong = [({"regex": "("}, "regex"), ({"rexeg": "a"}, "no field 'rexeg'"), (3, "or a dict"), ({}, "exactly one")]
    for form, words in wrong:
        with pytest.raises(InvalidArgument, match=words):
            StructuredOutputsProcessor(form, tokenizer, stock)
    with pytest.raises(InvalidArgument, match="fast tokenizer"):
        StructuredOutputsProcessor({"regex": "a"}, None, stock)


def test_a_form_that_takes_too_much_work_ends_its_own_call(patched, tokenizer):
    form = {"regex": "x{3000}{3000}"}
    for options in ({}, {"num_beams": 3}):
        processor = StructuredOutputsProcessor(form, tokenizer, patched)
        with pytest.raises((InvalidArgument, hf_paged.RequestFailed), match="structured_outputs: lexer error"):
            patched.generate(**inputs(5), do_sample=False, max_new_tokens=40, logits_processor=[processor], **options)
        engine = hf_paged.engine_of(patched)
        engine.check_integrity()
        assert engine.stats()["kv_bytes_in_use"] == 0


def test_other_ends_than_the_models_own(stock, patched, tokenizer):
    form, tokens = FORMS["choice"][0], []
    options = dict(do_sample=False, max_new_tokens=9)
    for one in (stock, patched):
        processor = StructuredOutputsProcessor(form, tokenizer, one, eos_token_id=[EOS, 9])
        tokens.append(one.generate(**inputs(5, 7), **options, eos_token_id=[9, EOS], logits_processor=[processor]))
        processor = StructuredOutputsProcessor(form, tokenizer, one)
        tokens.append(one.generate(**inputs(5), **options, eos_token_id=7, logits_processor=[processor]))
    assert tokens[0].tolist() == tokens[2].tolist() and tokens[1].tolist() == tokens[3].tolist()
