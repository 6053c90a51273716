"""`patch(model, verify=True)`: passes on what is right, names the layer of a planted fault, leaves nothing behind."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import tiny_model

import hf_paged
from hf_paged import VerificationFailed
from hf_paged.hf import model as model_module
from hf_paged.hf import patch as patch_module
from hf_paged.hf.fusion.norm import FusedNorm
from hf_paged.runtime.batch import StepContext

PROMPT = torch.tensor([[5, 9, 11, 40, 7, 8]])


def state_of(model) -> tuple:
    """All that a self-check might leave changed."""
    return (
        type(model),
        model.generation_config,
        [type(module) for module in model.modules()],
        [module.training for module in model.modules()],
        [dict(module._forward_hooks) for module in model.modules()],
        [parameter.clone() for parameter in model.parameters()],
        torch.get_rng_state(),
    )


def same(before: tuple, after: tuple) -> bool:
    tensors = zip(before[5], after[5], strict=True)
    return before[:5] == after[:5] and all(torch.equal(a, b) for a, b in tensors) and torch.equal(before[6], after[6])


def refused(model, match: str, **options) -> str:
    """The message of the refusal; the model is as it was."""
    before = state_of(model)
    expected = model.generate(PROMPT, max_new_tokens=6, do_sample=False)
    with pytest.raises(VerificationFailed, match=match) as caught:
        hf_paged.patch(model, verify=True, **options)
    assert same(before, state_of(model))
    assert torch.equal(model.generate(PROMPT, max_new_tokens=6, do_sample=False), expected)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "qwen3_moe", "bloom", "openai-gpt", "deepseek_v3"])
def test_a_right_model_passes_and_explain_tells(name, dtype):
    model = tiny_model(name, dtype=dtype).train()
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(0))
    before = state_of(model)
    hf_paged.patch(model, verify=True)
    assert not calls
    largest = hf_paged.explain(model).largest_difference
    assert 0 < largest < (1e-5 if dtype == torch.float32 else 0.1)
    assert "checked against the unpatched model" in str(hf_paged.explain(model))
    engine = hf_paged.engine_of(model)
    assert not engine.has_unfinished() and engine.stats()["steps"] == 0
    hf_paged.unpatch(model)
    assert same(before, state_of(model))


def test_without_it_nothing_is_said():
    model = tiny_model("llama")
    hf_paged.patch(model)
    assert hf_paged.explain(model).largest_difference is None and "checked" not in str(hf_paged.explain(model))


def test_attention_that_is_wrong_in_one_layer_is_named(monkeypatch):
    right = StepContext.attend_rotary

    def wrong(self, layer_idx, *args, **kwargs):
        output = right(self, layer_idx, *args, **kwargs)
        return output * 1.01 if layer_idx == 1 else output

    monkeypatch.setattr(StepContext, "attend_rotary", wrong)
    message = refused(tiny_model("llama"), r"first in model.layers.1: off by 0.0\d+ of its size")
    assert "LlamaForCausalLM" in message and "left unpatched" in message


def test_attention_that_is_wrong_when_decoding_is_found(monkeypatch):
    right = StepContext.attend_rotary

    def wrong(self, layer_idx, query, *args, **kwargs):
        output = right(self, layer_idx, query, *args, **kwargs)
        return output * 1.2 if len(query) <= 2 and layer_idx == 2 else output

    monkeypatch.setattr(StepContext, "attend_rotary", wrong)
    place = "(2[1-4] of a prompt of 21|4[5-8] of a prompt of 45)"
    refused(tiny_model("llama"), f"first in model.layers.2: .* most at position {place} tokens")


def test_a_wrong_fused_norm_is_named(monkeypatch):
    right = patch_module.fuse

    def wrong(model, *args, **options):
        fusions = right(model, *args, **options)
        norm = model.model.layers[1].post_attention_layernorm
        assert isinstance(norm, FusedNorm)
        norm._hf_paged["eps"] = 0.01
        return fusions

    monkeypatch.setattr(patch_module, "fuse", wrong)
    refused(tiny_model("llama"), "first in model.layers.1")


@pytest.mark.parametrize("window", [18, 20, None])
def test_a_wrong_window_is_found(monkeypatch, window):
    right = model_module.TransformersModel.__init__

    def wrong(self, *args):
        right(self, *args)
        changes = {2: {"window": window}}
        self.layers = [dataclasses.replace(spec, **changes.get(spec.layer_idx, {})) for spec in self.layers]

    monkeypatch.setattr(model_module.TransformersModel, "__init__", wrong)
    refused(tiny_model("mistral-window"), "first in model.layers.2")


def test_a_fault_in_a_narrow_type_is_found(monkeypatch):
    right = StepContext.attend_rotary
    monkeypatch.setattr(StepContext, "attend_rotary", lambda self, layer, q, *a, **k: right(self, layer, q, *a, **k).flip(1))
    refused(tiny_model("llama", dtype=torch.bfloat16), "first in model.layers.0")


def test_wrong_logits_are_found_too(monkeypatch):
    right = model_module.TransformersModel.forward
    monkeypatch.setattr(model_module.TransformersModel, "forward", lambda *args: right(*args) * 1.01)
    refused(tiny_model("llama"), "first in the logits")


def test_a_forward_that_fails_on_pages_is_told(monkeypatch):
    def fail(self, layer_idx, query, *args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(StepContext, "attend_rotary", fail)
    refused(tiny_model("llama"), "fails where it did not before: no such kernel")
