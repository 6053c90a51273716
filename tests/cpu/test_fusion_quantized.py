"""Fused forms on quantized layers: which are, that nothing changes by it, memory, and when layers go their own way."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from fusion_checks import GREEDY, PROMPTS, fused, outputs, stock_tokens, tokens
from quantized_models import SCHEMES, dequantized, quantized
from tiny_models import tiny_model

import hf_paged
from hf_paged import KernelUnavailable
from hf_paged.hf import patch as patch_module
from hf_paged.hf.fusion import merged as merged_module
from hf_paged.hf.fusion import mlp as mlp_module
from hf_paged_kernels.quantized import cat

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def model_of(label: str, scheme: str, **options):
    return quantized(tiny_model(label, **options), scheme)


def run(model) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in hf_paged.engine_of(model).generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("label", ["qwen3", "llama-mha-bias"])
def test_tokens_are_the_dequantized_models(label, scheme):
    model = model_of(label, scheme)
    expected = stock_tokens(dequantized(model) if SCHEMES[scheme].activations is None else model)
    assert tokens(model) == expected and fused(model) == (3, 3)
    counts = hf_paged.explain(model).fused
    assert (counts["qkv"], counts["gate_up"], counts["mlp"]) == (9, 6, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("label", "scheme"), [("qwen3", "int4-zeros-order"), ("phi3", "w8a8")])
def test_whole_layers_have_the_bits_of_their_parts(monkeypatch, label, scheme, dtype):
    model = model_of(label, scheme, dtype=dtype)
    whole = outputs(model)
    assert fused(model) == (3, 3)
    monkeypatch.setattr(patch_module, "fuse_layers", lambda *args: None)
    assert outputs(model) == whole and fused(model) == (0, 0)


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8-static", "fp8-blocks"])
def test_the_engine_has_the_bits_of_the_dequantized_model(scheme):
    """Inputs of fp8 layers are not rounded on CPU."""
    model = model_of("qwen3", scheme)
    assert outputs(model) == outputs(dequantized(hf_paged.unpatch(model)))


def storages(model) -> dict[int, int]:
    """Address -> bytes, of what the parameters of `model` keep alive."""
    found = [parameter.untyped_storage() for parameter in model.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.mark.parametrize("scheme", ["int4-zeros-order", "fp8-static"])
def test_memory_is_not_doubled_and_unpatching_separates(scheme):
    model = model_of("llama-mha-bias", scheme)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = sum(storages(model).values())
    hf_paged.patch(model)
    attention = model.model.layers[0].self_attn
    query, key, value = (getattr(attention, name).quantized for name in PROJECTIONS)
    assert query.data.untyped_storage().data_ptr() == value.data.untyped_storage().data_ptr()
    assert key.data.data_ptr() == query.data.data_ptr() + query.data.nbytes
    assert before <= sum(storages(model).values()) <= before * 1.05  # a static scale becomes one for each row
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    hf_paged.unpatch(model)
    assert sum(storages(model).values()) <= before * 1.05 and len(storages(model)) == len(list(model.parameters()))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_joining_needs_room_for_one_layer_at_a_time(monkeypatch):
    model = model_of("qwen3", "int4", num_hidden_layers=4, layer_types=None)

    def alive() -> int:
        """Bytes of all tensors there are."""
        tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
        return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())

    before, seen = alive(), []
    monkeypatch.setattr(merged_module, "cat", lambda weights: seen.append(alive()) or cat(weights))
    hf_paged.patch(model)
    a_layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    assert len(seen) == 8 and max(seen) <= before + a_layer and alive() <= before + a_layer


@pytest.mark.parametrize("change", ["load_state_dict", "load another order", "assign", "data", "to"])
def test_what_happens_to_a_layer_reaches_the_next_token(change):
    scheme = "int4-zeros-order" if "order" in change else "int4"
    model = model_of("llama-mha-bias", scheme)
    before = tokens(model)
    other = model_of("llama-mha-bias", scheme, seed=8)
    mine, its = model.model.layers[1], other.model.layers[1]
    if change == "load_state_dict":
        mine.load_state_dict(its.state_dict())
    elif change == "load another order":
        state = its.self_attn.k_proj.state_dict()
        order = torch.randperm(48, generator=torch.Generator().manual_seed(9))
        mine.self_attn.k_proj.load_state_dict({**state, "perm": order.int()})
    elif change == "assign":
        mine.self_attn.k_proj = its.self_attn.k_proj
    elif change == "data":
        mine.mlp.up_proj.scales.data = its.mlp.up_proj.scales.data * 0.7
    else:
        mine.self_attn.k_proj.bias.data = mine.self_attn.k_proj.bias.data * 3
    expected = stock_tokens(dequantized(model))
    assert run(model) == expected != before
    merged = mine.self_attn.q_proj._hf_paged[0]
    assert merged.joined == (change != "load another order")
    if change == "load another order":  # and it is joined again once it can be
        mine.self_attn.k_proj.load_state_dict(other.model.layers[1].self_attn.k_proj.state_dict())
        expected = stock_tokens(dequantized(model))
        assert run(model) == expected and merged.joined


def test_layers_of_different_kinds_are_not_joined():
    model = model_of("qwen3", "int4")
    other = model_of("qwen3", "int8")
    for layer, its in zip(model.model.layers, other.model.layers):
        layer.self_attn.k_proj, layer.mlp.down_proj = its.self_attn.k_proj, its.mlp.down_proj
    expected = stock_tokens(dequantized(model))
    assert tokens(model) == expected and fused(model) == (3, 3)
    report = hf_paged.explain(model)
    assert "qkv" not in report.fused and report.fused["gate_up"] == 6
    assert sorted((entry.kind, entry.layers) for entry in report.weights) == [("int4", 15), ("int8", 6)]


def test_a_hook_on_a_quantized_layer_acts_as_in_stock():
    def bend(module, args, output):
        return output * torch.linspace(-1, 1.5, output.shape[-1])

    model = model_of("qwen3", "int4")
    before = tokens(model)
    for name in "self_attn.k_proj", "mlp.down_proj", "mlp.up_proj":
        handle = model.model.layers[1].get_submodule(name).register_forward_hook(bend)
        expected = stock_tokens(copy.deepcopy(model))
        assert run(model) == expected != before
        handle.remove()


@pytest.mark.parametrize("scheme", ["w8a8", "int4"])
def test_a_wrong_formula_is_not_taken_for_a_rounding(monkeypatch, scheme):
    """Two kinds of GELU differ by less than a step of a rounding to 8 bits."""
    model = model_of("gemma", scheme)
    expected = tokens(model)
    assert hf_paged.explain(model).fused["mlp"] == 3
    hf_paged.unpatch(model)
    monkeypatch.setitem(mlp_module.ACTIVATIONS, type(model.model.layers[0].mlp.act_fn).__name__, "gelu")
    assert tokens(model) == expected
    assert "mlp" not in hf_paged.explain(model).fused and fused(model) == (3, 3)


def test_explain_names_format_kernel_and_what_falls_back():
    model = hf_paged.patch(model_of("qwen3", "fp8"))
    report = hf_paged.explain(model)
    (entry,) = report.weights
    assert (entry.format, entry.kind, entry.layers, entry.kernel) == ("as it is, fp8", "fp8", 21, "cpu")
    assert entry.input is None and any("not rounded to fp8" in limit for limit in report.limits)
    assert f"weights {entry}" in str(report) and not report.fallbacks

    report = hf_paged.explain(hf_paged.patch(model_of("qwen3", "w8a8")))
    assert report.weights[0].input == "int8" and "int8 x int8" in str(report)

    model = model_of("qwen3", "int4-odd-groups")
    (entry,) = hf_paged.explain(hf_paged.patch(model)).weights
    reason = "no cpu kernel multiplies int4 weights with a scale for 1 rows x 12 columns"
    assert (entry.kernel, entry.reason) == ("reference", reason)
    with pytest.raises(KernelUnavailable, match="no cpu kernel multiplies int4"):
        hf_paged.patch(model, strict=True)
