"""What runs transformers' own decoding loops on pages: beams, candidates, guidance, shown scores, given caches."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import CACHE, tiny_model
from transformers import DynamicCache, LogitsProcessor, StaticCache, WatermarkingConfig

import hf_paged
from hf_paged import KernelUnavailable, UnsupportedOption
from hf_paged.hf.paged_cache import PagedCache

WIDTH = 37


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def batch():
    return make_batch()


def make_batch(rows=3):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 199, (rows, WIDTH), generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 9, 33)[:rows]):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return dict(input_ids=ids, attention_mask=mask)


def both(model, *args, seed=None, **kwargs):
    """(stock result, patched result) of the same call from the same seed; the engine is left clean."""
    results = []
    for patched in (False, True):
        if patched:
            hf_paged.patch(model, block_size=16, max_batch_tokens=48)
        try:
            if seed is not None:
                torch.manual_seed(seed)
            results.append(model.generate(*args, **copy.copy(kwargs)))
            if patched:
                engine = hf_paged.engine_of(model)
                engine.step()
                engine.check_integrity()
                assert engine.stats()["kv_bytes_in_use"] == 0
        finally:
            if patched:
                hf_paged.unpatch(model)
    return results


def close(expected, actual):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def check_dict(stock, paged):
    """Every field of two results; padding has no defined hidden states."""
    assert type(paged) is type(stock)
    assert set(paged.keys()) == set(stock.keys())
    assert torch.equal(stock.sequences, paged.sequences)
    for name in ("scores", "logits"):
        if stock.get(name) is not None:
            assert len(stock[name]) == len(paged[name])
            for expected, actual in zip(stock[name], paged[name]):
                close(expected, actual)
    for name in ("sequences_scores", "beam_indices"):
        if stock.get(name) is not None:
            close(stock[name], paged[name])


BEAMS = [
    dict(num_beams=3),
    dict(num_beams=4, length_penalty=2.0, early_stopping=True, num_return_sequences=2),
    dict(num_beams=3, early_stopping="never", length_penalty=-1.0),
    dict(num_beams=3, num_return_sequences=3, no_repeat_ngram_size=2, repetition_penalty=1.2),
    dict(num_beams=2, prefix_allowed_tokens_fn=lambda row, ids: list(range(10 + 20 * row, 40 + 20 * row))),
    dict(num_beams=3, prefill_chunk_size=8),
]


@pytest.mark.parametrize("option", BEAMS, ids=lambda option: "-".join(option))
def test_beam_search(model, batch, option):
    options = dict(max_new_tokens=14, do_sample=False, eos_token_id=list(range(3, 30)), pad_token_id=0)
    stock, paged = both(model, **batch, **options, **option, return_dict_in_generate=True, output_scores=True)
    check_dict(stock, paged)


def test_beam_sampling_draws_as_stock(model, batch):
    options = dict(max_new_tokens=10, do_sample=True, num_beams=3, num_return_sequences=2, top_k=20, temperature=1.3)
    stock, paged = both(model, **batch, **options, seed=5)
    assert torch.equal(stock, paged)


def test_beams_share_the_prompt_s_blocks(model):
    ids = make_batch()["input_ids"][:1].repeat(1, 4)  # 148 tokens: nine full blocks
    hf_paged.patch(model, block_size=16)
    try:
        engine = hf_paged.engine_of(model)
        model.generate(ids, num_beams=5, max_new_tokens=3, do_sample=False)
        layers = hf_paged.hf.patch.patch_of(model).adapter.layers
        tokens = engine.stats()["kv_bytes_peak"] / sum(layer.bytes_per_token(torch.float32) for layer in layers)
        assert tokens <= 148 + 6 * 16  # and a block of its own for each beam, one more while copying
    finally:
        hf_paged.unpatch(model)


@pytest.mark.parametrize("seed", [None, 7])
def test_prompt_lookup(model, seed):
    ids = torch.tensor([[5, 6, 7, 8, 9] * 9])
    options = dict(max_new_tokens=40, do_sample=seed is not None, prompt_lookup_num_tokens=4)
    stock, paged = both(model, ids, **options, seed=seed)
    assert torch.equal(stock, paged)


@pytest.mark.parametrize("patched_assistant", [False, True])
@pytest.mark.parametrize("sample", [False, True])
def test_assistant_model(model, sample, patched_assistant):
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    options = dict(max_new_tokens=30, do_sample=sample, assistant_model=assistant, top_k=30)
    ids = make_batch()["input_ids"][:1]
    torch.manual_seed(3)
    stock = model.generate(ids, **options)
    hf_paged.patch(model)
    if patched_assistant:
        hf_paged.patch(assistant)
    try:
        torch.manual_seed(3)
        paged = model.generate(ids, **options)
    finally:
        hf_paged.unpatch(model)
        if patched_assistant:
            hf_paged.unpatch(assistant)
    assert torch.equal(stock, paged)


def test_classifier_free_guidance(model, batch):
    negative = torch.randint(3, 199, (3, 8), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(negative)
    mask[1, :3] = 0
    options = dict(max_new_tokens=12, do_sample=False, guidance_scale=1.7)
    stock, paged = both(model, **batch, **options)
    assert torch.equal(stock, paged)
    options |= dict(negative_prompt_ids=negative, negative_prompt_attention_mask=mask)
    guided_stock, guided = both(model, **batch, **options)
    assert torch.equal(guided_stock, guided)
    assert not torch.equal(guided, paged)


def test_watermark(model, batch):
    config = WatermarkingConfig(bias=3.0, seeding_scheme="selfhash")
    stock, paged = both(model, **batch, max_new_tokens=12, do_sample=False, watermarking_config=config)
    assert torch.equal(stock, paged)


@pytest.mark.parametrize("sample", [False, True])
def test_scores_logits_and_hidden_states(model, batch, sample):
    options = dict(max_new_tokens=9, do_sample=sample, eos_token_id=list(range(3, 60)), pad_token_id=0, top_k=40)
    shown = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True)
    stock, paged = both(model, **batch, **options, **shown, seed=4)
    check_dict(stock, paged)
    assert len(stock.hidden_states) == len(paged.hidden_states)
    for step, (expected, actual) in enumerate(zip(stock.hidden_states, paged.hidden_states)):
        assert len(expected) == len(actual)
        for a, b in zip(expected, actual):
            if step == 0:
                tokens = batch["attention_mask"].bool()
                a, b = a[tokens], b[tokens]
            close(a, b)


@pytest.mark.filterwarnings("ignore:output_attentions")
def test_attention_weights_come_from_stock_and_are_told(batch):
    model = tiny_model("llama", attn_implementation="eager")
    options = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_attentions=True)
    stock, paged = both(model, **batch, **options)
    check_dict(stock, paged)
    for expected, actual in zip(stock.attentions, paged.attentions):
        for a, b in zip(expected, actual):
            close(a, b)
    hf_paged.patch(model)
    try:
        with pytest.warns(UserWarning, match="output_attentions"):
            model.generate(**batch, **options)
        assert "output_attentions" in str(hf_paged.explain(model))
    finally:
        hf_paged.unpatch(model)


def test_inputs_embeds(model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach() * 1.1
    mask = batch["attention_mask"]
    for options in (dict(do_sample=False), dict(do_sample=False, num_beams=3)):
        stock, paged = both(model, inputs_embeds=embeds, attention_mask=mask, max_new_tokens=12, **options)
        assert torch.equal(stock, paged)
    stock, paged = both(model, **batch, inputs_embeds=embeds, max_new_tokens=12, do_sample=False)
    assert torch.equal(stock, paged)


def layers_equal(stock, paged, lengths):
    """Keys and values at the rows' own positions (a cache has garbage where a row has padding)."""
    assert type(stock) is type(paged) and len(stock.layers) == len(paged.layers)
    assert stock.get_seq_length() == paged.get_seq_length()
    for expected, actual in zip(stock.layers, paged.layers):
        assert type(expected) is type(actual)
        for name in ("keys", "values"):
            a, b = getattr(expected, name), getattr(actual, name)
            assert a.shape == b.shape and a.dtype == b.dtype
            for row, length in enumerate(lengths):
                close(a[row, :, -length:], b[row, :, -length:])


def test_a_returned_cache_is_stock_s_and_can_be_given_back(model, batch):
    options = dict(do_sample=False, return_dict_in_generate=True)
    stock, paged = both(model, **batch, max_new_tokens=6, **options)
    lengths = (batch["attention_mask"].sum(-1) + 5).tolist()
    layers_equal(stock[CACHE], paged[CACHE], lengths)

    ids = torch.cat([stock.sequences, torch.tensor([[11, 12], [13, 14], [15, 16]])], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 8, dtype=torch.long)], dim=1)
    again = dict(input_ids=ids, attention_mask=mask, max_new_tokens=8)
    results = []
    for patched, cache in ((False, stock[CACHE]), (True, paged[CACHE])):
        if patched:
            hf_paged.patch(model)
        results.append(model.generate(**again, **options, **{CACHE: cache}))
        if patched:
            hf_paged.unpatch(model)
        assert results[-1][CACHE] is cache  # it grew in place
    assert torch.equal(results[0].sequences, results[1].sequences)
    layers_equal(stock[CACHE], paged[CACHE], [length + 10 for length in lengths])
    fresh = model.generate(**again, do_sample=False)
    assert torch.equal(results[1].sequences, fresh)


def test_an_empty_cache_of_the_caller_is_filled(model, batch):
    caches = []
    for patched in (False, True):
        cache = DynamicCache(config=model.config)
        if patched:
            hf_paged.patch(model)
        out = model.generate(**batch, max_new_tokens=6, do_sample=False, **{CACHE: cache})
        if patched:
            hf_paged.unpatch(model)
        caches.append(cache)
    layers_equal(*caches, (batch["attention_mask"].sum(-1) + 5).tolist())
    assert out.shape[1] == WIDTH + 6


@pytest.mark.filterwarnings("ignore:past_key_values")
def test_other_caches_run_on_stock(model, batch):
    results = []
    for patched in (False, True):
        cache = StaticCache(config=model.config, max_cache_len=60)
        if patched:
            hf_paged.patch(model)
        results.append(model.generate(**batch, max_new_tokens=6, do_sample=False, **{CACHE: cache}))
        if patched:
            hf_paged.unpatch(model)
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:attention_mask")
@pytest.mark.filterwarnings("ignore:torch.autocast")
@pytest.mark.filterwarnings("ignore:cache_implementation")
def test_what_pages_do_not_have_runs_on_stock(model, batch):
    holes = batch["attention_mask"].clone()
    holes[0, 5] = 0
    stock, paged = both(model, batch["input_ids"], attention_mask=holes, max_new_tokens=5, do_sample=False)
    assert torch.equal(stock, paged)
    stock, paged = both(model, **batch, max_new_tokens=5, do_sample=False, cache_implementation="static")
    assert torch.equal(stock, paged)
    with torch.autocast("cpu", torch.bfloat16):
        stock, paged = both(model, **batch, max_new_tokens=5, do_sample=False)
    assert torch.equal(stock, paged)


def test_strict_turns_a_fallback_into_an_error(model, batch):
    config = hf_paged.EngineConfig()
    hf_paged.patch(model, config)
    strict = hf_paged.hf.patch.patch_of(model)
    strict.config = config.replace(strict=True)
    try:
        with pytest.raises(KernelUnavailable, match="cache_implementation"):
            model.generate(**batch, max_new_tokens=2, cache_implementation="static")
    finally:
        hf_paged.unpatch(model)


def test_own_position_ids(model, batch):
    positions = torch.arange(WIDTH)[None].repeat(3, 1) + torch.tensor([[0], [3], [40]])
    for options in (dict(), dict(num_beams=2)):
        stock, paged = both(model, **batch, position_ids=positions, max_new_tokens=6, do_sample=False, **options)
        assert torch.equal(stock, paged)


@pytest.mark.parametrize("use_cache", [False, True])
def test_use_cache_changes_no_token(model, batch, use_cache):
    options = dict(max_new_tokens=6, do_sample=False, use_cache=use_cache)
    stock, paged = both(model, **batch, **options)
    assert torch.equal(stock, paged)
    stock, paged = both(model, **batch, **options, return_dict_in_generate=True)
    check_dict(stock, paged)
    assert (paged.get(CACHE) is None) == (stock.get(CACHE) is None)


def test_hidden_states_without_a_cache_are_of_whole_rows(model, batch):
    options = dict(use_cache=False, return_dict_in_generate=True, output_hidden_states=True)
    with pytest.warns(UserWarning, match="use_cache"):
        stock, paged = both(model, **batch, **options, max_new_tokens=3, do_sample=False)
    assert paged.hidden_states[2][0].shape[1] == WIDTH + 2
    check_dict(stock, paged)


def test_a_given_cache_that_is_not_to_be_used(model):
    """transformers then feeds the whole row to it at every step; so does a patched model."""
    options = dict(max_new_tokens=4, do_sample=False)
    first = model.generate(**make_batch(1), **options, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[5, 6]])], dim=1)
    stock = model.generate(longer, **{CACHE: copy.deepcopy(first[CACHE])}, **options, use_cache=False)
    patched = hf_paged.patch(copy.deepcopy(model))
    with pytest.warns(UserWarning, match="use_cache"):
        paged = patched.generate(longer, **{CACHE: first[CACHE]}, **options, use_cache=False)
    assert torch.equal(stock, paged)


def test_nothing_is_guessed_without_a_cache(model):
    for one in (model, hf_paged.patch(copy.deepcopy(model))):
        with pytest.raises((RuntimeError, ValueError), match="cache"):
            one.generate(**make_batch(1), use_cache=False, prompt_lookup_num_tokens=2, max_new_tokens=3)


class Remembers(LogitsProcessor):
    """Depends on the calls before: every token may come once in the whole batch."""

    def __init__(self):
        self.seen = set()

    def __call__(self, input_ids, scores):
        self.seen |= set(input_ids[:, -1].tolist())
        scores = scores.clone()
        scores[:, sorted(self.seen)] = -float("inf")
        return scores


def test_processors_with_memory_are_called_as_in_stock(model, batch):
    results = []
    for patched in (False, True):
        if patched:
            hf_paged.patch(model)
        results.append(model.generate(**batch, max_new_tokens=9, do_sample=False, logits_processor=[Remembers()]))
        if patched:
            hf_paged.unpatch(model)
    assert torch.equal(*results)


def test_pages_can_be_neither_copied_nor_pickled(model):
    hf_paged.patch(model)
    try:
        cache = PagedCache(hf_paged.engine_of(model))
        for taking in (copy.deepcopy, pickle.dumps):
            with pytest.raises(UnsupportedOption, match="past_key_values"):
                taking(cache)
    finally:
        hf_paged.unpatch(model)


def test_return_sequences_share_the_prompt_s_blocks(model):
    ids = make_batch()["input_ids"][:1].repeat(1, 4)
    hf_paged.patch(model, block_size=16)
    try:
        engine = hf_paged.engine_of(model)
        torch.manual_seed(0)
        out = model.generate(ids, num_return_sequences=6, max_new_tokens=3, do_sample=True)
        assert len(set(map(tuple, out.tolist()))) > 1
        layers = hf_paged.hf.patch.patch_of(model).adapter.layers
        tokens = engine.stats()["kv_bytes_peak"] / sum(layer.bytes_per_token(torch.float32) for layer in layers)
        assert tokens <= 148 + 7 * 16
    finally:
        hf_paged.unpatch(model)


def test_decoding_modes_side_by_side_in_threads(model, batch):
    """Beams, candidates and plain rows at once on one model: each gets what it gets alone."""
    calls = [
        dict(num_beams=3, max_new_tokens=12),
        dict(max_new_tokens=20),
        dict(num_beams=2, max_new_tokens=9, num_return_sequences=2),
        dict(max_new_tokens=14, guidance_scale=1.4),
    ]
    expected = [model.generate(**batch, **call, do_sample=False) for call in calls]
    hf_paged.patch(model, block_size=16, max_batch_tokens=48)
    try:
        with ThreadPoolExecutor(len(calls)) as pool:
            futures = [pool.submit(model.generate, **batch, **call, do_sample=False) for call in calls * 2]
            for future, stock in zip(futures, expected * 2):
                assert torch.equal(future.result(), stock)
        engine = hf_paged.engine_of(model)
        engine.step()
        engine.check_integrity()
        assert engine.stats()["kv_bytes_in_use"] == 0
    finally:
        hf_paged.unpatch(model)
