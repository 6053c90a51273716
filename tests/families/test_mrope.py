"""Models with M-RoPE: text runs on pages whatever form its inputs have, images visibly on transformers' own path."""

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


def test_images_run_on_transformers_own_path_and_say_so(patched):
    options = dict(with_image(1), max_new_tokens=12, do_sample=False)
    theirs = stock(patched, **options)
    assert not torch.equal(theirs, stock(patched, **with_image(2), max_new_tokens=12, do_sample=False))
    with pytest.warns(UserWarning, match="not on pages"):
        assert torch.equal(patched.generate(**options), theirs)
    hf_paged.patch(patched, strict=True)
    with pytest.raises(KernelUnavailable, match="strict"):
        patched.generate(**options)


@pytest.mark.filterwarnings("ignore:.*not on pages")
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
