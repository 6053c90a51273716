"""Speculative decoding: the same output in fewer steps, for every request it may be used for, and for no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import consult
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import StoppingCriteria

import hf_paged
from hf_paged import Engine, EngineConfig, InvalidArgument, SamplingParams, Speculation
from hf_paged.engine.speculation import Pace, share

VOCAB = 320
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
REPETITIVE = [[70, 71, 72, 73, 74] * 6, [9, 8, 7] * 10, list(range(100, 125)) * 2]


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(VOCAB)


@pytest.fixture
def open_engine(model, tokenizer):
    """Opens engines one after the other; each must end with every block given back."""
    opened = []

    def open_one(**options):
        if opened:
            opened.pop().close()
        opened.append(Engine(model, tokenizer, EngineConfig(block_size=16, **options)))
        return opened[0]

    yield open_one
    engine = opened.pop()
    assert not engine.has_unfinished() and engine.stats()["kv_bytes_in_use"] == 0
    engine.check_integrity()
    engine.close()


def contents(outputs) -> list:
    return [
        (c.token_ids, c.text, c.logprobs, c.finish_reason, c.stop_reason) for output in outputs for c in output.outputs
    ]


def test_repetition_is_guessed_and_the_output_is_the_same_in_fewer_steps(open_engine):
    params = replace(GREEDY, max_tokens=80, logprobs=2)
    engine = open_engine()
    expected, plain = engine.generate(REPETITIVE, params), engine.stats()
    engine = open_engine(speculation="ngram")
    outputs, stats = engine.generate(REPETITIVE, params), engine.stats()
    assert contents(outputs) == contents(expected)  # log-probabilities included, bit for bit
    assert stats["steps"] < plain["steps"] and stats["output_tokens"] == plain["output_tokens"]
    assert stats["accepted_tokens"] == sum(o.metrics.num_accepted_tokens for o in outputs) > 0
    assert stats["draft_tokens"] == sum(o.metrics.num_draft_tokens for o in outputs) > stats["accepted_tokens"]
    assert stats["acceptance_rate"] == stats["accepted_tokens"] / stats["draft_tokens"]
    assert (plain["draft_tokens"], plain["acceptance_rate"]) == (0, None)
    assert stats["time_draft"] > 0 == plain["time_draft"]


def test_sampled_requests_are_guessed_too(open_engine):
    params = SamplingParams(temperature=0.3, top_p=0.9, seed=4, n=3, max_tokens=60, ignore_eos=True)
    expected = open_engine().generate(REPETITIVE, params)
    engine = open_engine(speculation="ngram")
    assert contents(engine.generate(REPETITIVE, params)) == contents(expected)
    assert engine.stats()["accepted_tokens"] > 0


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("place", [1, 2, 4, 7])
@pytest.mark.parametrize("how", ["stop_token_ids", "stop", "stop included", "eos", "max_tokens"])
def test_an_output_ends_at_the_same_token_wherever_the_guesses_lie(
    open_engine, model, tokenizer, monkeypatch, how, place, right
):
    prompt = [list(range(40, 60))]
    whole = open_engine(speculation=Speculation("ngram", num_tokens=9)).generate(prompt, GREEDY)
    tokens = whole[0].outputs[0].token_ids
    options = dict(logprobs=0)
    if how == "stop_token_ids":
        options[how] = [tokens[place]]
    elif how == "max_tokens":
        options[how] = place + 1
    elif how == "eos":
        options["ignore_eos"] = False
        monkeypatch.setattr(model.generation_config, "eos_token_id", tokens[place])
    else:
        options |= dict(stop=[tokenizer.decode([tokens[place]])], include_stop_str_in_output=how == "stop included")
    params = replace(GREEDY, **options)
    expected = open_engine().generate(prompt, params)
    engine = open_engine(speculation=Speculation("ngram", num_tokens=9))
    consult(engine, whole, chance=1.0 if right else 0.6)
    outputs = engine.generate(prompt, params)
    assert contents(outputs) == contents(expected)
    length = len(outputs[0].outputs[0].token_ids)
    assert length <= place + 1 or how in ("stop", "stop included")  # half a character is no stop string yet
    assert engine.stats()["accepted_tokens"] > 0 or not right or length <= 2


def test_no_more_is_guessed_than_the_output_may_have(open_engine):
    prompt = [list(range(40, 60))]
    expected = open_engine().generate(prompt, GREEDY)
    engine = open_engine(speculation=Speculation("ngram", num_tokens=64), max_model_len=30)
    consult(engine, expected)
    output = engine.generate(prompt, replace(GREEDY, max_tokens=None))[0]
    assert output.outputs[0].token_ids == expected[0].outputs[0].token_ids[:10]
    assert output.metrics.num_draft_tokens == output.metrics.num_accepted_tokens == 8  # of ten
    assert engine.stats()["steps"] == 2


def test_user_processors_see_every_position_once_so_nothing_is_guessed(open_engine):
    engine = open_engine(speculation="ngram")
    expected = engine.generate(REPETITIVE[:1], GREEDY)[0].outputs[0].token_ids
    seen = []

    def watch(token_ids, logits):
        seen.append(len(token_ids))
        return logits

    results = []
    engine.add(REPETITIVE[0], GREEDY, logits_processors=[watch], on_output=results.append)
    while engine.has_unfinished():
        engine.step()
    assert results[-1].outputs[0].token_ids == expected
    assert seen == list(range(30, 30 + 24))
    assert results[-1].metrics.num_draft_tokens == 0


def test_user_criteria_see_every_token_once_and_in_order(open_engine):
    engine = open_engine(speculation="ngram")
    expected = engine.generate(REPETITIVE[:1], replace(GREEDY, max_tokens=60))
    consult(engine, expected)
    seen, results = [], []

    def stop_at_20(token_ids):
        seen.append(list(token_ids))
        return len(token_ids) == 30 + 20

    engine.add(
        REPETITIVE[0], replace(GREEDY, max_tokens=60), stopping_criteria=[stop_at_20], on_output=results.append
    )
    while engine.has_unfinished():
        engine.step()
    whole = REPETITIVE[0] + list(expected[0].outputs[0].token_ids)
    assert seen == [whole[:end] for end in range(31, 51)]
    assert results[-1].outputs[0].token_ids == whole[30:50]
    assert results[-1].outputs[0].finish_reason == "stop"
    assert results[-1].metrics.num_accepted_tokens > 5


def test_a_criterion_that_raises_among_right_guesses_ends_its_own_request_there(open_engine):
    engine = open_engine(speculation="ngram")
    expected = engine.generate(REPETITIVE, GREEDY)
    consult(engine, expected)

    def fail(token_ids):
        if len(token_ids) == 30 + 9:
            raise KeyError("mine")
        return False

    results = {}
    for number, prompt in enumerate(REPETITIVE):
        engine.add(
            prompt,
            GREEDY,
            request_id=str(number),
            stopping_criteria=[fail] if number == 0 else [],
            on_output=lambda output: results.__setitem__(int(output.request_id), output),
        )
    while engine.has_unfinished():
        engine.step()
    assert isinstance(results[0].error.__cause__, KeyError)
    assert results[0].outputs[0].token_ids == expected[0].outputs[0].token_ids[:9]
    assert contents([results[1], results[2]]) == contents(expected[1:])


def test_a_full_step_is_not_made_longer(open_engine):
    """On a CPU guesses fill a step up to 32 tokens: 40 running sequences leave no room."""
    engine = open_engine(speculation="ngram", max_num_seqs=64)
    engine.generate([REPETITIVE[0]] * 40, replace(GREEDY, max_tokens=30))
    assert engine.stats()["draft_tokens"] == 0


def test_a_step_that_fails_with_guesses_is_tried_without_them_before_anybody_is_blamed(open_engine, monkeypatch):
    engine = open_engine(speculation="ngram", prefix_cache=False)
    expected = engine.generate(REPETITIVE[:1], GREEDY)
    consult(engine, expected)
    forward, refused = engine.model.forward, []

    def refuse_a_few_rows(context, rows):
        if 1 < context.input_ids.shape[1] < 16:
            refused.append(context.input_ids.shape[1])
            raise RuntimeError("no")
        return forward(context, rows)

    monkeypatch.setattr(engine.model, "forward", refuse_a_few_rows)
    outputs = engine.generate(REPETITIVE[:1], GREEDY)
    assert len(refused) == 1  # and then never again
    assert contents(outputs) == contents(expected)
    assert outputs[0].metrics.num_accepted_tokens == 0


def test_a_proposer_that_raises_hurts_nobody_and_is_warned_of_once(open_engine):
    engine = open_engine(speculation="ngram")
    expected = engine.generate(REPETITIVE, GREEDY)
    asked = []

    def propose(jobs):
        asked.append(len(jobs))
        raise OSError("the disk is gone")

    engine._speculator._proposer.propose = propose
    with pytest.warns(UserWarning, match="speculation: .*the disk is gone") as caught:
        outputs = engine.generate(REPETITIVE, replace(GREEDY, max_tokens=60))
    assert len(caught) == 1 and 2 <= len(asked) < 10  # less and less often
    assert [output.outputs[0].token_ids[:24] for output in outputs] == [o.outputs[0].token_ids for o in expected]


# -- generate of a patched model


def generate(model, prompts, **options):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    torch.manual_seed(7)
    return model.generate(ids, attention_mask=mask, max_new_tokens=40, **options)


class StopOnRepeat(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        tail = input_ids[0, -4:].tolist()
        return torch.tensor([len(set(tail)) == 1])


@pytest.mark.parametrize(
    "options, guessed",
    [
        (dict(do_sample=False), True),
        (dict(do_sample=False, eos_token_id=[5, 71]), True),
        (dict(do_sample=False, repetition_penalty=1.1), True),
        (dict(do_sample=False, num_return_sequences=1, stop_strings=["e"]), True),
        (dict(do_sample=False, stopping_criteria=[StopOnRepeat()]), False),  # sees the whole batch at every step
        (dict(do_sample=False, no_repeat_ngram_size=6), False),  # stock's own processor, one position at a time
    ],
)
def test_generate_is_stocks_with_guesses(model, tokenizer, options, guessed):
    if "stop_strings" in options:
        options = options | dict(tokenizer=tokenizer)
    rows = [generate(model, [prompt], **options)[0] for prompt in REPETITIVE]
    hf_paged.patch(model, speculation="ngram")
    try:
        for prompt, expected in zip(REPETITIVE, rows):
            assert torch.equal(generate(model, [prompt], **options)[0], expected)
        assert (hf_paged.engine_of(model).stats()["draft_tokens"] > 0) == guessed
    finally:
        hf_paged.unpatch(model)


def test_generate_of_a_padded_batch_with_scores_and_streams_is_stocks(model):
    options = dict(do_sample=False, eos_token_id=71, pad_token_id=0)
    expected = generate(model, REPETITIVE, **options)
    scored = generate(model, REPETITIVE, output_scores=True, return_dict_in_generate=True, **options)
    hf_paged.patch(model, speculation="ngram")
    try:
        assert torch.equal(generate(model, REPETITIVE, **options), expected)
        drafted = hf_paged.engine_of(model).stats()["draft_tokens"]
        assert drafted > 0
        got = generate(model, REPETITIVE, output_scores=True, return_dict_in_generate=True, **options)
        assert torch.equal(got.sequences, scored.sequences)
        assert hf_paged.engine_of(model).stats()["draft_tokens"] == drafted  # scores are taken one position at a time
    finally:
        hf_paged.unpatch(model)


def test_one_seeded_row_draws_from_torch_as_stock_does(model):
    expected = generate(model, REPETITIVE[:1], do_sample=True)
    hf_paged.patch(model, speculation="ngram")
    try:
        assert torch.equal(generate(model, REPETITIVE[:1], do_sample=True), expected)
    finally:
        hf_paged.unpatch(model)


# -- configuration and rules


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: EngineConfig(speculation="medusa"), "speculation"),
        (lambda: EngineConfig(speculation=3), "speculation"),
        (lambda: Speculation("medusa"), "speculation"),
        *((lambda wrong=wrong: Speculation("ngram", num_tokens=wrong), "speculation: num_tokens") for wrong in (0, 65, True)),
        *(
            (lambda wrong=wrong: Speculation("ngram", ngram_range=wrong), "speculation: ngram_range")
            for wrong in ((3, 2), (0, 2), 3, ("1", 2))
        ),
    ],
)
def test_wrong_options_are_refused_by_name(make, named):
    with pytest.raises(InvalidArgument, match=f"^{named}"):
        make()


def test_right_guesses_bring_more_of_them_and_wrong_ones_fewer_and_pauses():
    pace = Pace(most=7, count=2)
    counts = []
    for _ in range(3):
        counts.append(pace.next())
        pace.learn(counts[-1], counts[-1])
    assert counts == [2, 4, 7]
    pace.learn(7, 3)
    assert pace.next() == 4
    pauses = []
    for _ in range(7):
        pace.learn(pace.count, 0)
        pauses.append(0)
        while not (count := pace.next()):
            pauses[-1] += 1
        assert count == 1
    assert pauses == [0, 1, 3, 7, 15, 15, 15]
    pace.learn(1, 1)
    assert pace.next() == 2


def test_right_guesses_that_were_fewer_than_wanted_take_nothing_back():
    pace = Pace(most=7, count=6)
    pace.learn(1, 1)
    assert pace.next() == 6


def test_room_is_dealt_out_evenly():
    assert share(0, [3, 3]) == [0, 0]
    assert share(2, [3, 3, 3]) == [1, 1, 0]
    assert share(7, [1, 5, 3]) == [1, 3, 3]
    assert share(50, [1, 5, 3]) == [1, 5, 3]
    assert share(5, []) == []
