"""`patch(model, quantization=...)`: what becomes of the model, of what is saved, and which models are refused."""

from __future__ import annotations

import weakref

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged import InvalidArgument, UnsupportedModel
from hf_paged.hf.quantize import spot
from hf_paged.quant.experts import QuantExperts
from hf_paged.quant.linear import QuantLinear

PROMPT = torch.tensor([[5, 9, 11, 40, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25, 3, 4, 5, 6, 7, 8]])
KINDS = ["int4", "int8", "fp8"]


def source(label="llama", **overrides):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    if label in ("llama", "qwen2", "gemma2"):
        sizes["head_dim"] = 16
    return tiny_model(label, **sizes | overrides)


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits


def quantized(model) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def dequantized(model):
    """`model`, with plain layers of the same weights."""
    for name, layer in quantized(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(layer.dequantize())
        plain.bias = layer.bias
        model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_quantizes_and_generates_the_dequantized_models_tokens(kind):
    model, before = source(), logits(source())
    assert hf_paged.patch(model, quantization=kind) is model
    assert len(quantized(model)) == 14 and type(model.lm_head) is not QuantLinear
    difference = ((logits(model) - before).norm() / before.norm()).item()
    assert 0 < difference < {"int4": 0.5, "int8": 0.05, "fp8": 0.2}[kind]
    tokens = model.generate(PROMPT, max_new_tokens=12)
    hf_paged.unpatch(model)
    assert len(quantized(model)) == 14
    assert tokens.tolist() == dequantized(model).generate(PROMPT, max_new_tokens=12).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", ["llama-tied-llama3-rope", "qwen2", "gpt2", "bloom", "mixtral", "deepseek_v3"])
def test_saved_and_loaded_again(label, kind, tmp_path):
    """Biases, tied embeddings, Conv1D, layers whose weights other code reads, experts, latent attention."""
    model = source(label)
    hf_paged.patch(model, quantization=kind)
    expected, count = logits(model), len(quantized(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(quantized(loaded)) == count > 0
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)


@pytest.mark.parametrize("kind", ["int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, kind, tmp_path):
    model = source(dtype=dtype)
    hf_paged.patch(model, quantization=kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded).dtype == dtype and torch.equal(logits(loaded), logits(model))


def test_float_weights_go_one_by_one(monkeypatch):
    model = source()
    weights = [weakref.ref(module.weight) for name, module in model.model.named_modules() if name.endswith("_proj")]
    alive = []

    def round_to_nearest(weight, scheme):
        alive.append(sum(ref() is not None for ref in weights))
        return original(weight, scheme)

    original = spot.round_to_nearest
    monkeypatch.setattr(spot, "round_to_nearest", round_to_nearest)
    hf_paged.patch(model, quantization="int8")
    assert alive == list(range(14, 0, -1))
    assert not any(ref() is not None for ref in weights)


def test_groups_are_as_large_as_all_layers_allow():
    model = source(hidden_size=128, intermediate_size=256, head_dim=32)
    hf_paged.patch(model, quantization="int4")
    assert {layer.quantized.block for layer in quantized(model).values()} == {(1, 128)}
    assert "GPTQ 4 bit, groups of 128: int4" in str(hf_paged.explain(model))
    model = source()
    hf_paged.patch(model, quantization="int4")
    assert {layer.quantized.block for layer in quantized(model).values()} == {(1, 32)}
    assert "GPTQ 4 bit, groups of 32: int4" in str(hf_paged.explain(model))


def test_explain_names_the_layers_left_plain():
    model = source("bloom")
    hf_paged.patch(model, quantization="int8")
    plain = hf_paged.explain(model).plain
    assert plain["transformer.h.*.mlp.dense_4h_to_h"] == "other code reads its weight"
    odd = source(intermediate_size=72)
    hf_paged.patch(odd, quantization="int8")
    assert hf_paged.explain(odd).plain["model.layers.*.mlp.down_proj"] == "64 x 72 are no multiples of 16"
    assert "plain   model.layers.*.mlp.up_proj: 72 x 64" in str(hf_paged.explain(odd))


@pytest.mark.parametrize("kind", KINDS)
def test_experts(kind, tmp_path):
    model, before = source("qwen3_moe"), logits(source("qwen3_moe"))
    hf_paged.patch(model, quantization=kind)
    assert sum(isinstance(module, QuantExperts) for module in model.modules()) == 2
    assert not hf_paged.explain(model).plain
    difference = ((logits(model) - before).norm() / before.norm()).item()
    assert 0 < difference < {"int4": 0.6, "int8": 0.1, "fp8": 0.3}[kind]
    tokens = model.generate(PROMPT, max_new_tokens=8)
    hf_paged.unpatch(model)
    assert model.generate(PROMPT, max_new_tokens=8).tolist() == tokens.tolist()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_routers_and_the_head_stay(tmp_path):
    model = source("granitemoe")
    hf_paged.patch(model, quantization="int8")
    assert not any("router" in name or "head" in name for name in quantized(model))


def test_tied_layers_stay():
    model = source()
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    hf_paged.patch(model, quantization="int8")
    assert len(quantized(model)) == 12
    assert first.up_proj.weight is second.up_proj.weight
    assert hf_paged.explain(model).plain == {"model.layers.*.mlp.up_proj": "its weight is tied to another module's"}


def test_hooks_move_to_the_new_layer():
    model = source()
    seen = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: seen.append(type(args[0])))
    hf_paged.patch(model, quantization="int8")
    logits(model)
    assert seen == [type(model.model.layers[0].mlp.up_proj)] and issubclass(seen[0], QuantLinear)
    handle.remove()
    logits(model)
    assert len(seen) == 1


def test_again_in_the_same_way_changes_nothing():
    model = source()
    hf_paged.patch(model, quantization="int8")
    before = logits(model)
    hf_paged.patch(model, quantization="int8", max_num_seqs=2)
    hf_paged.unpatch(model)
    hf_paged.patch(model)
    assert torch.equal(logits(model), before)


def test_patched_before():
    """Merged weights come apart first."""
    model, expected = source(), source()
    hf_paged.patch(expected, quantization="int8")
    hf_paged.patch(model)
    hf_paged.patch(model, quantization="int8")
    assert torch.equal(logits(model), logits(expected))


def test_verify_compares_with_the_quantized_model():
    model = source()
    hf_paged.patch(model, quantization="int4", verify=True)
    assert hf_paged.explain(model).largest_difference < 1e-4


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda model: None, "int5", "quantization must be one of int4, int8, fp8"),
        (lambda model: model.train(), "int8", "quantization: this LlamaForCausalLM is in training mode"),
        (lambda model: spot.quantize_on_the_spot(model, "int4"), "int8", "is quantized already .gptq"),
    ],
)
def test_refused(change, kind, message):
    model = source()
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InvalidArgument, match=message):
        hf_paged.patch(model, quantization=kind)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_to_quantize():
    with pytest.raises(UnsupportedModel, match="has no linear layer to quantize: .* no multiples of 16"):
        hf_paged.patch(tiny_model("llama", hidden_size=40, intermediate_size=40, head_dim=10), quantization="int8")
