"""Models with M-RoPE: text and images run on pages, with stock's tokens, wherever the images move the positions."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from family_checks import NEW, Comparison
from tiny_models import CACHE, tiny_model

import hf_paged
from hf_paged import EngineConfig, KernelUnavailable, SamplingParams

LABELS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
IMAGE, START, END = 190, 191, 192
PATCHES = 16  # of an image of 4 x 4 patches, which is 4 tokens


@pytest.fixture(scope="module", params=LABELS)
def model(request):
    return tiny_model(
        request.param, image_token_id=IMAGE, video_token_id=193, vision_start_token_id=START, vision_end_token_id=END
    )


@pytest.fixture
def patched(model):
    yield hf_paged.patch(model)
    hf_paged.unpatch(model)


def padded(*rows: list[int]) -> dict:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return dict(input_ids=ids, attention_mask=mask)


def stock(model, **options):
    hf_paged.unpatch(model)
    try:
        return model.generate(**options)
    finally:
        hf_paged.patch(model)


TEXT = padded(list(range(20, 33)), [40, 41, 42, 43], list(range(50, 75)))
ROWS = "greedy", "with what a processor says of text"  # the others run transformers' own loop on pages
WAYS = {
    "greedy": dict(do_sample=False),
    "with what a processor says of text": dict(do_sample=False, mm_token_type_ids=torch.zeros_like(TEXT["input_ids"])),
    "beams": dict(do_sample=False, num_beams=3, output_scores=True),
    "logits": dict(do_sample=False, output_logits=True),
    "prompt lookup": dict(do_sample=False, prompt_lookup_num_tokens=3),
}


@pytest.mark.parametrize("way", WAYS)
def test_text_runs_on_pages_with_stocks_tokens(patched, way):
    shown = {} if way in ROWS else dict(return_dict_in_generate=True)
    options = dict(TEXT, max_new_tokens=12, **WAYS[way], **shown)
    if way == "prompt lookup":  # takes one row
        options |= padded([7, 8, 9, 10, 7, 8, 9])
    theirs = stock(patched, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = patched.generate(**options)
    if way in ROWS:
        assert torch.equal(mine, theirs)
        return
    assert torch.equal(mine.sequences, theirs.sequences)
    if way == "logits":
        torch.testing.assert_close(torch.stack(mine.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)
    if way == "beams":
        torch.testing.assert_close(mine.sequences_scores, theirs.sequences_scores, rtol=1e-4, atol=1e-4)


def with_image(seed: int) -> dict:
    """Two left-padded rows, each with an image of its own."""
    inputs = padded([20, 21, START, *[IMAGE] * 4, END, 22, 23], [30, START, *[IMAGE] * 4, END, 31])
    generator = torch.Generator().manual_seed(seed)
    return dict(
        inputs,
        pixel_values=torch.randn(2 * PATCHES, 3 * 2 * 4 * 4, generator=generator),
        image_grid_thw=torch.tensor([[1, 4, 4]] * 2),
        mm_token_type_ids=(inputs["input_ids"] == IMAGE).int(),
    )


GREEDY = dict(max_new_tokens=12, do_sample=False)


def on_pages(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model.generate(**options)


def test_images_run_on_pages(patched):
    first, second = (dict(with_image(seed), **GREEDY) for seed in (1, 2))
    theirs = stock(patched, **first)
    assert not torch.equal(theirs, stock(patched, **second))
    assert torch.equal(on_pages(patched, **first), theirs)


def test_a_prompt_that_ends_in_an_image_goes_on_in_every_plane(patched):
    inputs = padded([20, 21, START, *[IMAGE] * 6])
    grid = torch.tensor([[1, 4, 6]])
    pixels = torch.randn(24, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(3))
    options = dict(
        inputs, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=(inputs["input_ids"] == IMAGE).int(), **GREEDY
    )
    assert torch.equal(on_pages(patched, **options), stock(patched, **options))


@pytest.mark.parametrize("change", ["all moved", "an image stretched", "the text between moved", "text's", "one row's"])
def test_positions_of_the_callers_own(patched, change):
    """They are not the images' own, so nobody else may have what was computed with them."""
    options = dict(with_image(1), **GREEDY)
    positions, _ = patched.model.get_rope_index(**{k: v for k, v in options.items() if k not in GREEDY})
    own = dict(options, position_ids=torch.cat([positions[:1] * 0 + torch.arange(10), positions]))
    if change == "text's":
        own["position_ids"] = (options["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    elif change == "one row's":
        own["position_ids"] = own["position_ids"][:, :1]
    elif change == "all moved":
        own["position_ids"][1:] += torch.tensor([3, 5, 7])[:, None, None]
    elif change == "an image stretched":
        own["position_ids"][1:, :, 4:7] *= 2
    elif change == "the text between moved":
        own["position_ids"][1:, :, -2:] += 3
    expected = [stock(patched, **each) for each in (options, own)]
    assert torch.equal(*expected) == (change == "all moved"), "only differences count"
    for _ in range(2):
        assert torch.equal(on_pages(patched, **own), expected[1])
        assert torch.equal(on_pages(patched, **options), expected[0])


def test_tasks_and_log_probabilities_of_prompts_with_images(model):
    row = {name: value[: PATCHES if name == "pixel_values" else 1] for name, value in with_image(1).items()}
    with torch.no_grad():
        states = model.model(**row).last_hidden_state[0]
        expected = model(**row).logits[0].log_softmax(-1)
    ids = row["input_ids"][0].tolist()
    images = {name: row[name] for name in ("pixel_values", "image_grid_thw")}
    with hf_paged.Engine(model, config=EngineConfig(max_batch_tokens=6)) as engine:
        mean = engine.submit(ids, hf_paged.EmbedParams(pooling="mean", normalize=False), images=images)
        told = engine.submit(ids, SamplingParams(max_tokens=1, prompt_logprobs=0), images=images)
        while engine.has_unfinished():
            engine.step()
    torch.testing.assert_close(torch.tensor(mean.output.result.embedding), states.mean(0), rtol=1e-4, atol=1e-4)
    for place, (token, entry) in enumerate(zip(ids[1:], told.output.prompt_logprobs[1:], strict=True)):
        assert entry[token].logprob == pytest.approx(expected[place, token].item(), abs=1e-4)


def test_videos_run_on_transformers_own_path_and_say_so(patched):
    inputs = padded([20, 21, START, *[193] * 4, END, 22])
    options = dict(
        inputs,
        pixel_values_videos=torch.randn(PATCHES, 3 * 2 * 4 * 4),
        video_grid_thw=torch.tensor([[1, 4, 4]]),
        mm_token_type_ids=2 * (inputs["input_ids"] == 193).int(),
        **GREEDY,
    )
    theirs = stock(patched, **options)
    with pytest.warns(UserWarning, match="not on pages"):
        assert torch.equal(patched.generate(**options), theirs)
    hf_paged.patch(patched, strict=True)
    with pytest.raises(KernelUnavailable, match="strict"):
        patched.generate(**options)


def test_equal_images_of_another_shape_are_told_apart(patched):
    """Their embeddings are the same, but not where they stand."""
    engine = hf_paged.engine_of(patched)
    answers = []
    for grid in ([1, 4, 8], [1, 8, 4]):
        inputs = padded([*range(20, 36), START, *[IMAGE] * 8, END, *range(40, 60)])
        types = (inputs["input_ids"] == IMAGE).int()
        pixels = torch.zeros(32, 3 * 2 * 4 * 4)
        options = dict(inputs, pixel_values=pixels, image_grid_thw=torch.tensor([grid]), mm_token_type_ids=types, **GREEDY)
        answers.append((options, on_pages(patched, **options)))
        assert engine.stats()["prefix_hit_tokens"] <= 16
    for options, answer in answers:
        assert torch.equal(stock(patched, **options), answer)


def test_the_positions_of_an_image_do_not_reach_the_text_after_it(patched):
    """The model keeps the offset of the last call with an image, which only a call that goes on from it may use."""
    text = dict(TEXT, max_new_tokens=8, do_sample=False)
    expected = stock(patched, **text)
    options = dict(with_image(1), max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    first = stock(patched, **options)
    onward = dict(
        input_ids=torch.nn.functional.pad(first.sequences, (0, 3), value=25),
        attention_mask=torch.nn.functional.pad(options["attention_mask"], (0, 9), value=1),
        max_new_tokens=8,
        do_sample=False,
    )
    continued = stock(patched, **onward, **{CACHE: copy.deepcopy(first[CACHE])})
    mine = patched.generate(**options)
    assert torch.equal(patched.generate(**onward, **{CACHE: mine[CACHE]}), continued)
    [output] = hf_paged.engine_of(patched).generate(
        [list(range(20, 33))], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    )
    assert output.outputs[0].token_ids == expected[0, -8:].tolist()
    assert torch.equal(patched.generate(**text), expected)


def test_chunks_prefix_hits_and_guesses(model):
    comparison = Comparison(model)
    comparison.check_chunks_and_prefix_hits()
    comparison.check_preemption()
    with hf_paged.Engine(model, config=EngineConfig(speculation="ngram")) as engine:
        outputs = engine.generate(comparison.jobs, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
    assert [output.outputs[0].token_ids for output in outputs] == [tokens for tokens, _ in comparison.expected]
