"""Models that take images: `generate` with what a processor gives runs on pages, with stock's own tokens."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from tiny_models import tiny_model
from vision_inputs import LABELS, batch

import hf_paged
from hf_paged import Engine, EngineConfig, ImageLimits, SamplingParams

ROWS = [
    [*range(20, 33), [1], 40, 41, 42],
    [50, [2], *range(60, 64), [3], 70, [4]],
    [*range(80, 99)],
    [[6], 100],
]


@pytest.fixture(scope="module")
def label(request):
    return request.param


@pytest.fixture(scope="module")
def model(label):
    return tiny_model(label)


# The others differ from one of these in little that the slow tests are about.
CORE = ["llava", "gemma3", "smolvlm", "qwen2_vl"]
of_every_family = pytest.mark.parametrize("label", LABELS, indirect=True, scope="module")
of_most_families = pytest.mark.parametrize(
    "label",
    [pytest.param(label, marks=() if label in CORE else pytest.mark.slow) for label in LABELS],
    indirect=True,
    scope="module",
)


@pytest.fixture
def patched(model):
    yield hf_paged.patch(model, max_batch_tokens=32)
    if hf_paged.hf.patch.is_patched(model):
        hf_paged.unpatch(model)


def stock(model, config=None, **options):
    hf_paged.unpatch(model)
    try:
        return model.generate(**options)
    finally:
        hf_paged.patch(model, config or EngineConfig(max_batch_tokens=32))


GREEDY = dict(max_new_tokens=10, do_sample=False)
SHOWN = dict(return_dict_in_generate=True, output_logits=True)
WAYS = {
    "greedy": GREEDY,
    "penalty": dict(GREEDY, repetition_penalty=1.3),
    "logits": dict(GREEDY, **SHOWN),
    "hidden states": dict(GREEDY, return_dict_in_generate=True, output_hidden_states=True),
    "beams": dict(GREEDY, num_beams=3, num_return_sequences=2),
    "one row, sampled": dict(max_new_tokens=10, do_sample=True, num_return_sequences=1),
    "own processor": dict(GREEDY, logits_processor=[lambda ids, scores: scores - 0.1 * scores.roll(1, -1)]),
    "prompt lookup": dict(GREEDY, prompt_lookup_num_tokens=3),
}


FEW = ["greedy", "beams"]
SOME = [*FEW, "logits", "prompt lookup"]


@pytest.mark.parametrize(
    "label, way",
    [(label, way) for label in LABELS for way in (WAYS if label == "gemma3" else SOME if label in CORE else FEW)],
    indirect=["label"],
    scope="module",
)
def test_images_run_on_pages_with_stocks_tokens(patched, label, way):
    rows = ROWS[1:2] if way in ("one row, sampled", "prompt lookup") else ROWS
    options = WAYS[way]
    torch.manual_seed(3)
    if way == "prompt lookup" and label in (
        "smolvlm",
        "idefics3",
    ):  # it guesses placeholders, for which there is no image
        for generate in (partial(stock, patched), patched.generate):
            with pytest.raises((ValueError, RuntimeError), match="do not match|divisible|Number of elements"):
                generate(**batch(patched, label, rows), **options)
        return
    theirs = stock(patched, **batch(patched, label, rows), **options)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = patched.generate(**batch(patched, label, rows), **options)
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(mine, theirs)
        return
    assert torch.equal(mine.sequences, theirs.sequences)
    for name in {"logits", "hidden_states"} & set(theirs):
        for own, other in zip(mine[name], theirs[name], strict=True):
            pairs = [(own, other)] if isinstance(own, torch.Tensor) else zip(own, other, strict=True)
            for a, b in pairs:
                if a.dim() == 3 and a.shape[1] > 1:  # padding has other numbers
                    kept = batch(patched, label, rows)["attention_mask"].bool()
                    a, b = a[kept], b[kept]
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@of_most_families
def test_several_rows_of_one_prompt(patched, label):
    options = dict(max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=3)
    theirs = stock(patched, **batch(patched, label, ROWS), **options)
    assert torch.equal(patched.generate(**batch(patched, label, ROWS), **options), theirs)


@of_most_families
def test_the_image_decides(patched, label):
    one, other = ([20, [seed], 40, 41] for seed in (4, 8))  # of the same size
    inputs = [batch(patched, label, [row]) for row in (one, other)]
    assert torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"]) or label in ("smolvlm", "idefics3")
    answers = [patched.generate(**mine, **GREEDY) for mine in inputs]
    assert not torch.equal(answers[0][:, -10:], answers[1][:, -10:])
    again = [patched.generate(**mine, **GREEDY) for mine in inputs]
    assert all(map(torch.equal, answers, again))
    assert all(torch.equal(answer, stock(patched, **mine, **GREEDY)) for answer, mine in zip(answers, inputs))


@of_most_families
def test_the_same_image_is_found_in_the_prefix_cache_and_another_is_not(patched, label):
    engine = hf_paged.engine_of(patched)
    row = [*range(100, 140), [4], *range(20, 60)]
    patched.generate(**batch(patched, label, [row]), **GREEDY)
    engine.reset_stats()
    again = patched.generate(**batch(patched, label, [row]), **GREEDY)
    assert engine.stats()["prefix_hit_tokens"] >= 80
    assert torch.equal(again, stock(patched, **batch(patched, label, [row]), **GREEDY))
    engine = hf_paged.engine_of(patched)
    patched.generate(**batch(patched, label, [row]), **GREEDY)
    engine.reset_stats()
    row[40] = [8]
    other = patched.generate(**batch(patched, label, [row]), **GREEDY)
    assert engine.stats()["prefix_hit_tokens"] in (32, 0)
    assert torch.equal(other, stock(patched, **batch(patched, label, [row]), **GREEDY))


@of_most_families
def test_images_of_rows_in_little_memory(model, label):
    """Rows are preempted and computed again."""
    inputs = lambda: batch(model, label, ROWS * 2)  # noqa: E731
    theirs = model.generate(**inputs(), max_new_tokens=40, do_sample=False)
    hf_paged.patch(model, max_batch_tokens=24, kv_cache_memory=200_000, prefix_cache=False)
    try:
        assert torch.equal(model.generate(**inputs(), max_new_tokens=40, do_sample=False), theirs)
        windows_only = label == "llava-mistral"  # which take little whatever comes
        assert windows_only or hf_paged.engine_of(model).stats()["preemptions"] > 0
    finally:
        hf_paged.unpatch(model)


@of_every_family
def test_an_engine_takes_what_the_processor_made(model, label):
    """It runs the encoder itself: in small steps, image by image, beside text."""
    rows = [ROWS[1], ROWS[2], [50, [2], *range(60, 64), [7], 70, [4]]]
    made = [batch(model, label, [row]) for row in rows]
    expected = [model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist() for inputs in made]
    jobs = [(inputs["input_ids"][0].tolist(), None if "pixel_values" not in inputs else inputs) for inputs in made]
    config = EngineConfig(max_batch_tokens=32, images=ImageLimits(tokens_per_step=5))
    params = SamplingParams(temperature=0, max_tokens=GREEDY["max_new_tokens"], ignore_eos=True)
    with Engine(model, config=config) as engine:
        for _ in range(2):
            outputs = engine.generate([ids for ids, _ in jobs], params, images=[images for _, images in jobs])
            assert [output.outputs[0].token_ids for output in outputs] == expected
        assert engine.stats()["prefix_hit_tokens"] > 0


@of_most_families
def test_more_placeholders_than_images_is_an_error_as_in_stock(patched, label):
    inputs = batch(patched, label, [[20, [4], 30]])
    inputs["input_ids"][0, 0] = 190
    with pytest.raises(ValueError, match="do not match|divisible"):
        patched.generate(**inputs, **GREEDY)
