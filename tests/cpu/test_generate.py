"""`generate` of a patched model against the same call on the unpatched model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList

import hf_paged
from hf_paged import InvalidArgument, RequestTooLarge, UnsupportedOption

WIDTH = 21


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 199, (4, WIDTH), generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 7, 20, 3)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return dict(input_ids=ids, attention_mask=mask)


def both(model, *args, seed=None, **kwargs):
    """(stock result, patched result) of the same call from the same seed."""
    results = []
    for patched in (False, True):
        if patched:
            hf_paged.patch(model)
        try:
            if seed is not None:
                torch.manual_seed(seed)
            results.append(model.generate(*args, **kwargs))
        finally:
            if patched:
                hf_paged.unpatch(model)
    return results


def an_eos(model, batch) -> int:
    """A token that some rows produce early and others late, so that rows end at different lengths."""
    out = model.generate(**batch, max_new_tokens=16, do_sample=False)[:, WIDTH:]
    return out[0, 4].item()


def test_greedy_rows_of_different_length(model, batch):
    stock, paged = both(model, **batch, max_new_tokens=30, do_sample=False)
    assert torch.equal(stock, paged)


def test_rows_that_end_at_eos_are_padded_as_stock_pads(model, batch):
    eos = an_eos(model, batch)
    stock, paged = both(model, **batch, max_new_tokens=40, do_sample=False, eos_token_id=eos, pad_token_id=0)
    assert torch.equal(stock, paged)
    assert (stock[:, WIDTH:] == eos).any()


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")  # stock's own
def test_single_row_without_mask_and_default_length(model):
    stock, paged = both(model, torch.tensor([[5, 9, 11]]), do_sample=False)
    assert torch.equal(stock, paged)


@pytest.mark.parametrize("option", ["output_scores", "output_logits"])
def test_scores_and_logits_also_of_rows_that_ended(model, batch, option):
    eos = an_eos(model, batch)
    stock, paged = both(
        model,
        **batch,
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
        repetition_penalty=1.3,
        return_dict_in_generate=True,
        **{option: True},
    )
    assert type(paged) is type(stock)
    assert torch.equal(stock.sequences, paged.sequences)
    name = option.removeprefix("output_")
    assert len(stock[name]) == len(paged[name])
    for expected, actual in zip(stock[name], paged[name]):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


PROCESSOR_OPTIONS = [
    dict(repetition_penalty=1.4),
    dict(no_repeat_ngram_size=2),
    dict(bad_words_ids=[[7], [9, 4]]),
    dict(min_new_tokens=10, eos_token_id=list(range(3, 120))),
    dict(min_length=28, eos_token_id=list(range(3, 120))),
    dict(suppress_tokens=list(range(3, 100))),
    dict(begin_suppress_tokens=list(range(3, 150))),
    dict(sequence_bias={(17,): 5.0, (20, 21): -4.0}),
    dict(forced_eos_token_id=11),
    dict(exponential_decay_length_penalty=(3, 1.5), eos_token_id=11),
    dict(encoder_repetition_penalty=1.5),
    dict(encoder_no_repeat_ngram_size=2),
    dict(renormalize_logits=True),
    dict(remove_invalid_values=True),
    dict(prefix_allowed_tokens_fn=lambda row, ids: list(range(10 + 20 * row, 40 + 20 * row))),
]


@pytest.mark.parametrize("option", PROCESSOR_OPTIONS, ids=lambda option: next(iter(option)))
def test_processors_act_as_in_stock(model, batch, option):
    stock, paged = both(model, **batch, max_new_tokens=14, do_sample=False, pad_token_id=0, **option)
    assert torch.equal(stock, paged)


SAMPLING_OPTIONS = [
    dict(),
    dict(temperature=0.6),
    dict(temperature=1.7, top_k=7),
    dict(top_p=0.8, top_k=0),
    dict(min_p=0.05, top_k=30, top_p=0.95, temperature=0.9),
    dict(typical_p=0.7),
    dict(epsilon_cutoff=0.01),
    dict(eta_cutoff=0.01),
    dict(repetition_penalty=1.5, top_k=20),
    dict(num_return_sequences=1, top_h=0.4),
]


@pytest.mark.parametrize("option", SAMPLING_OPTIONS, ids=str)
def test_one_seeded_row_samples_the_same_tokens_as_stock(model, option):
    ids = torch.tensor([[5, 9, 11, 40]])
    stock, paged = both(model, ids, max_new_tokens=25, do_sample=True, seed=11, **option)
    assert torch.equal(stock, paged)


def test_several_sampled_rows_follow_stock_s_distribution(model):
    ids = torch.tensor([[5, 9, 11, 40]])
    torch.manual_seed(0)
    options = dict(max_new_tokens=1, do_sample=True, top_k=5, temperature=1.5, num_return_sequences=2000)
    stock, paged = both(model, ids, **options)
    logits = model(ids).logits[0, -1] / 1.5
    top = logits.topk(5)
    expected = top.values.softmax(-1) * 2000
    for result in (stock, paged):
        counts = torch.stack([(result[:, -1] == token).sum() for token in top.indices]).double()
        assert counts.sum() == 2000
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < 18.5  # 4 degrees of freedom, p = 0.001


def test_sampling_repeats_with_torch_s_seed_and_differs_without(model, batch):
    hf_paged.patch(model)
    try:
        run = lambda: model.generate(**batch, max_new_tokens=12, do_sample=True)  # noqa: E731
        torch.manual_seed(5)
        first = run()
        torch.manual_seed(5)
        assert torch.equal(first, run())
        assert not torch.equal(first, run())
    finally:
        hf_paged.unpatch(model)


class AddToToken(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 3 + input_ids.shape[-1] % 50] += 100.0
        return scores


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        ended = (input_ids[:, -1] % 7 == 0) | (input_ids.shape[1] >= self.length)
        return ended


def test_user_processors_see_padded_rows(model, batch):
    stock, paged = both(model, **batch, max_new_tokens=9, do_sample=False, logits_processor=[AddToToken()])
    assert torch.equal(stock, paged)


@pytest.mark.parametrize("eos", [None, 150])
def test_user_criteria_end_rows_as_in_stock(model, batch, eos):
    criteria = StoppingCriteriaList([StopAt(WIDTH + 20)])
    options = dict(max_new_tokens=30, do_sample=False, stopping_criteria=criteria, eos_token_id=eos, pad_token_id=0)
    stock, paged = both(model, **batch, **options)
    assert torch.equal(stock, paged)


def test_max_time_stops(model, batch):
    hf_paged.patch(model)
    try:
        out = model.generate(**batch, max_new_tokens=400, do_sample=False, max_time=0.0)
        assert out.shape[1] == WIDTH + 1
    finally:
        hf_paged.unpatch(model)


class Collect:
    def __init__(self):
        self.pieces, self.ended = [], 0

    def put(self, value):
        self.pieces.append(value.clone())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("rows", [1, 4])
def test_streamer_gets_what_stock_puts(model, batch, rows):
    batch = {name: value[:rows] for name, value in batch.items()}
    eos = an_eos(model, batch)
    seen = []
    for patched in (False, True):
        streamer = Collect()
        if patched:
            hf_paged.patch(model)
        model.generate(
            **batch, max_new_tokens=20, do_sample=False, streamer=streamer, eos_token_id=eos, pad_token_id=0
        )
        if patched:
            hf_paged.unpatch(model)
        assert streamer.ended == 1
        seen.append(streamer.pieces)
    assert len(seen[0]) == len(seen[1])
    assert all(torch.equal(stock, paged) for stock, paged in zip(*seen))


def test_num_return_sequences_and_greedy_copies(model, batch):
    torch.manual_seed(1)
    stock, paged = both(model, **batch, max_new_tokens=5, do_sample=True, num_return_sequences=3, top_k=1)
    assert torch.equal(stock, paged)


class CountsRows(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + 3 * torch.arange(len(scores))[:, None] * torch.arange(scores.shape[1]).sin()


class EndsTogether(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((4,), bool((input_ids[:, -1] % 5 == 0).any()))


def test_callables_see_the_whole_batch_as_in_stock(model, batch):
    options = dict(max_new_tokens=9, do_sample=False, logits_processor=[CountsRows()], stopping_criteria=[EndsTogether()])
    stock, paged = both(model, **batch, **options)
    assert torch.equal(stock, paged)


@pytest.mark.filterwarnings("ignore")  # stock logs about the id
def test_an_eos_that_never_comes(model, batch):
    stock, paged = both(model, **batch, max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert torch.equal(stock, paged)


class Raises(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise KeyError("mine")


def test_a_processor_that_raises_ends_the_call_and_frees_everything(model, batch):
    hf_paged.patch(model)
    try:
        with pytest.raises(KeyError, match="mine"):
            model.generate(**batch, max_new_tokens=5, do_sample=False, logits_processor=[Raises()])
        engine = hf_paged.engine_of(model)
        assert not engine.has_unfinished()
        assert engine.stats()["kv_bytes_in_use"] == 0
        engine.check_integrity()
        assert model.generate(**batch, max_new_tokens=5, do_sample=False).shape == (4, WIDTH + 5)
    finally:
        hf_paged.unpatch(model)


def test_bad_input_is_refused_by_name_and_harms_nothing(model, batch):
    hf_paged.patch(model)
    try:
        empty = batch["attention_mask"].clone()
        empty[1] = 0
        with pytest.raises(InvalidArgument, match="row 1 is empty"):
            model.generate(batch["input_ids"], attention_mask=empty, max_new_tokens=2)
        for options in (dict(), dict(num_beams=2)):
            with pytest.raises(InvalidArgument, match="token id 5000"):
                model.generate(torch.tensor([[4, 5000]]), max_new_tokens=2, **options)
            with pytest.raises(InvalidArgument, match="token id -3"):
                model.generate(torch.tensor([[4, -3]]), max_new_tokens=2, **options)
            with pytest.raises(RequestTooLarge, match="max_new_tokens"):
                model.generate(**batch, max_new_tokens=600, **options)
        with pytest.raises(UnsupportedOption, match="cache_implementation"):
            model.generate(**batch, max_new_tokens=2, cache_implementation="paged")
        with pytest.raises(UnsupportedOption, match="generate_batch"):
            model.generate_batch([[3, 4]])
        engine = hf_paged.engine_of(model)
        assert not engine.has_unfinished() and engine.stats()["kv_bytes_in_use"] == 0
        engine.check_integrity()
    finally:
        hf_paged.unpatch(model)
