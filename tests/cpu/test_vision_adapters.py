"""Adapters beside images."""

from __future__ import annotations

import copy

import pytest
from peft_adapters import WARNINGS, shake
from PIL import Image
from tiny_processors import tiny_pair

from hf_paged import Engine, SamplingParams, UnsupportedOption

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(*WARNINGS)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def tokens(engine, prompt, images, adapter) -> list[int]:
    state = engine.submit(prompt, GREEDY, images=images, adapter=adapter)
    while not state.finished:
        engine.step()
    state.raise_error()
    return state.output.outputs[0].token_ids


def test_adapters_of_the_language_model(tmp_path):
    """Others would change what the encoder sees, and are refused beside images."""
    model, processor, shown = tiny_pair("llava")
    text, image = f"a{shown}b", [Image.new("RGB", (20, 12), (200, 30, 90))]
    inputs = processor(text=[text], images=image, return_tensors="pt")
    targets = {"language": r".*language_model.*\.(q_proj|down_proj)", "all": ["q_proj"]}
    expected = {}
    for name, modules in targets.items():
        tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=modules))
        shake(tuned)
        tuned.save_pretrained(tmp_path / name)
        output = tuned.eval().generate(**inputs, max_new_tokens=8, do_sample=False)
        expected[name] = output[0, inputs["input_ids"].shape[1] :].tolist()
    with Engine(model, processor) as engine:
        for name in targets:
            engine.load_adapter(name, str(tmp_path / name))
        assert tokens(engine, text, image, "language") == expected["language"] != tokens(engine, text, image, None)
        assert tokens(engine, "no image", None, "all")
        with pytest.raises(UnsupportedOption, match="adapter 'all' changes more than the language model"):
            engine.add(text, GREEDY, images=image, adapter="all")
