"""Checkpoints with quantized experts: loaded stacked, run, saved as they were, and what cannot be loaded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fusion_checks import stock_tokens, tokens
from quantized_checkpoints import awq_layer, eight_bit_layer, gptq_layer, packed_layer_of_ct, same_bits, save_quantized
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged import InvalidArgument, UnsupportedOption
from hf_paged.quant.experts import ExpertLayers, QuantExperts

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True}
PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": GROUP}},
}  # fmt: skip
CHANNEL = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}}},
}  # fmt: skip
IDS = torch.arange(3, 60)[None]


def gptq(name, N, K):
    return None if name.endswith("shared_expert_gate") else gptq_layer(N, K)


def act_order(name, N, K):
    return gptq_layer(N, K, act_order=True)


def awq(name, N, K):
    return awq_layer(N, K)


def fp8(name, N, K):
    return eight_bit_layer(N, K, block=(None, None), name="weight_scale_inv", shape=())


def fp8_static(name, N, K):
    tensors, weight = fp8(name, N, K)
    return {**tensors, "activation_scale": torch.rand(()) * 0.01 + 0.02}, weight


def fp8_blocks(name, N, K):
    return eight_bit_layer(N, K, block=(16, 16), name="weight_scale_inv")


def fp8_channels(name, N, K):
    return eight_bit_layer(N, K, dtype=torch.bfloat16)


def packed(name, N, K):
    return packed_layer_of_ct(N, K)


def source(label: str):
    return tiny_model(label, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def experts_of(model) -> list:
    return [module for module in model.modules() if isinstance(module, QuantExperts | ExpertLayers)]


@pytest.fixture
def stored(tmp_path):
    """(the dequantized model, the folder of its checkpoint)"""
    model = source("qwen3_moe")
    save_quantized(model, tmp_path / "stored", GPTQ, gptq)
    return model, tmp_path / "stored"


def assert_same_model(model, expected):
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("label", "config", "make"), [
    ("qwen3_moe", GPTQ, gptq), ("mixtral", GPTQ, gptq), ("deepseek_v3", GPTQ, gptq), ("qwen2_moe", GPTQ, gptq),
    ("qwen3_moe", AWQ, awq), ("qwen3_moe", GPTQ, act_order), ("mixtral", FP8, fp8),
    ("mixtral", {**FP8, "activation_scheme": "static"}, fp8_static),
    ("deepseek_v3", {**FP8, "weight_block_size": [16, 16]}, fp8_blocks), ("qwen3_moe", PACKED, packed),
    ("qwen3_moe", CHANNEL, fp8_channels),
])  # fmt: skip
def test_checkpoints_load_as_the_dequantized_model_and_are_saved_as_they_were(tmp_path, label, config, make):
    """Also while patched, with projections merged. Experts of an order, or a scale of inputs, each are not stacked."""
    expected = source(label)
    save_quantized(expected, tmp_path / "stored", config, make)
    model = load(tmp_path / "stored")
    kinds = {type(module) for module in experts_of(model)}
    assert kinds == {ExpertLayers if make in (act_order, fp8_static) else QuantExperts}
    assert_same_model(model, expected)
    assert tokens(model) == stock_tokens(expected)
    model.save_pretrained(tmp_path / "again")
    mine, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("again", "stored"))
    assert mine.keys() == theirs.keys()
    assert all(same_bits(tensor, theirs[name]) for name, tensor in mine.items())


def test_explain_counts_experts_and_says_which_run_one_after_the_other(stored, tmp_path):
    expected, folder = stored
    model = hf_paged.patch(load(folder))
    report = hf_paged.explain(model)
    assert report.fused["experts"] == 2 and not report.fallbacks
    assert sum(entry.layers for entry in report.weights) == 2 * (4 + 2)
    save_quantized(expected, tmp_path / "ordered", GPTQ, act_order)
    report = hf_paged.explain(hf_paged.patch(load(tmp_path / "ordered")))
    assert "perm differs" in report.fallbacks["4 experts"]


@pytest.mark.parametrize("make", [gptq, act_order])
def test_gradients_are_the_dequantized_models(tmp_path, make):
    expected = source("qwen3_moe")
    save_quantized(expected, tmp_path, GPTQ, make)
    gradients = []
    for model in load(tmp_path), expected:
        inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=inputs).logits.square().sum().backward()
        gradients.append((inputs.grad, model.model.layers[0].mlp.gate.weight.grad))
    for mine, theirs in zip(*gradients):
        torch.testing.assert_close(mine, theirs, atol=1e-3 * theirs.abs().max().item(), rtol=1e-3)


def test_state_dicts_copies_pickles_and_types(stored):
    expected, folder = stored
    model, other = load(folder), source("qwen3_moe")
    assert_same_model(copy.deepcopy(model), expected)
    assert_same_model(pickle.loads(pickle.dumps(model)), expected)
    narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = expected(IDS).logits
        errors = (narrow(IDS).logits.float() - exact).abs().amax(-1) / exact.abs().max()
    assert narrow.dtype == torch.bfloat16 and errors.median() < 0.1  # a token here and there goes to another expert
    save_quantized(other, folder.parent / "other", GPTQ, gptq)
    addresses = [parameter.data_ptr() for parameter in experts_of(model)[1].parameters()]
    state = load(folder.parent / "other").state_dict()
    model.load_state_dict(state)
    assert_same_model(model, other)
    assert [parameter.data_ptr() for parameter in experts_of(model)[1].parameters()] == addresses
    del state["model.layers.1.mlp.experts.2.up_proj.qzeros"]
    with pytest.raises(RuntimeError, match=r"experts\.2\.up_proj\.qzeros is missing"):
        model.load_state_dict(state)


def test_dequantized_on_loading(stored):
    expected, folder = stored
    model = load(folder).dequantize()
    mine, its = (each.model.layers[0].mlp.experts for each in (model, expected))
    assert not experts_of(model) and type(mine) is type(its)
    assert_same_model(model, expected)


def test_biases_of_zeros_are_dropped(tmp_path):
    """As auto-gptq writes them."""

    def with_bias(name, N, K):
        tensors, weight = gptq_layer(N, K)
        return {**tensors, "bias": torch.zeros(N)}, weight

    expected = source("mixtral")
    save_quantized(expected, tmp_path, GPTQ, with_bias)
    model = load(tmp_path)
    assert experts_of(model)[0].first.bias is None
    assert_same_model(model, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, name: state.pop(f"{name}.scales"), "scales is missing"),
        (lambda state, name: [state.pop(key) for key in list(state) if key.startswith(name)], "qweight is missing"),
        (lambda state, name: state.update({f"{name}.qweight": state[f"{name}.qweight"][1:]}), "qweight has shape"),
        (lambda state, name: state.update({f"{name}.scales": state[f"{name}.scales"] / 0}), "scales has values"),
    ],
)
def test_a_wrong_checkpoint_is_refused_by_the_experts_name(stored, change, message):
    _, folder = stored
    name = "model.layers.1.mlp.experts.2.down_proj"
    state = load_file(folder / "model.safetensors")
    change(state, name)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidArgument, match=rf"{name}: {message}"):
        load(folder)


def test_experts_of_which_some_are_not_quantized_are_refused(tmp_path):
    some = lambda name, *sizes: gptq(name, *sizes) if "layers.1." in name else None  # noqa: E731
    save_quantized(source("qwen3_moe"), tmp_path, GPTQ, some)
    with pytest.raises(UnsupportedOption, match=r"layers\.0\.mlp\.experts: its experts are not quantized"):
        load(tmp_path)


def test_experts_of_another_kind_are_refused(tmp_path):
    """GPT-OSS has them transposed, with gates and the other half alternating."""
    model = tiny_model("gpt_oss", num_hidden_layers=1)
    save_quantized(model, tmp_path, GPTQ, lambda *layer: None)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.mlp.experts.0.gate_up_proj.qweight"] = torch.zeros(6, 128, dtype=torch.int32)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedOption, match=r"layers\.0\.mlp\.experts: quantized experts of a GptOssExperts"):
        load(tmp_path)
