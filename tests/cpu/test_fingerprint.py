"""A model's fingerprint: the same for the same model loaded again, another for whatever computes something else."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged import Engine, UnsupportedOption
from hf_paged.hf.fingerprint import fingerprint


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", vocab_size=320)


def test_a_model_loaded_again_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, again = (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval() for _ in range(2))
    with Engine(loaded), Engine(again) as engine:
        assert engine.model.fingerprint() == fingerprint(loaded)
        engine.generate([[5, 6, 7]])
        assert fingerprint(again) == fingerprint(loaded)
        again.train()
        assert fingerprint(again) == fingerprint(loaded)


def one_value(model):
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[7, 5] = torch.nextafter(weight[7, 5], weight.new_tensor(9.0))


def of_another_layer(model):
    first, second = (layer.mlp for layer in model.model.layers[:2])
    first.up_proj, second.up_proj = second.up_proj, first.up_proj


def epsilon(model):
    model.model.norm.variance_epsilon *= 2


def configuration(model):
    model.config.rope_parameters["rope_theta"] = 5.0


def kind(model):
    class Other(type(model.model.norm)):
        pass

    model.model.norm.__class__ = Other


@pytest.mark.parametrize("change", [one_value, of_another_layer, epsilon, configuration, kind])
def test_whatever_computes_something_else_is_another(model, change):
    changed = copy.deepcopy(model)
    assert fingerprint(changed) == fingerprint(model)
    change(changed)
    assert fingerprint(changed) != fingerprint(model)


def test_what_weights_do_not_tell_has_none(model):
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    try:
        with pytest.raises(UnsupportedOption, match="model.layers.0 has forward hooks"):
            fingerprint(model)
    finally:
        handle.remove()
    changed = copy.deepcopy(model)
    changed.model.norm.forward = lambda hidden: hidden
    with pytest.raises(UnsupportedOption, match="model.norm has a forward of its own"):
        fingerprint(changed)


def test_patching_is_part_of_it_and_unpatching_takes_it_back(model):
    before = fingerprint(model)
    hf_paged.patch(model)
    assert fingerprint(model) != before
    hf_paged.unpatch(model)
    assert fingerprint(model) == before
