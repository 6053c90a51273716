"""Quantized layers on Triton: as many kernels as plain ones, results as near to the truth, recorded, and experts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fusion_checks import GREEDY
from quantized_checkpoints import eight_bit_layer, gptq_layer, save_quantized
from quantized_models import dequantized, quantized
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.hf.fusion import fuse, fuse_layers
from hf_paged.hf.fusion.trial import Trial
from hf_paged.runtime.runner import as_in_a_step

PROMPTS = [[5, 6, 7], list(range(20, 41))]


def model_of(label, scheme, device, **options):
    return quantized(tiny_model(label, num_hidden_layers=1, layer_types=None, **options).to(device), scheme)


@pytest.mark.parametrize(("label", "scheme"), [("llama", "int4"), ("qwen3", "fp8")])
def test_a_layer_launches_no_more_kernels_than_with_plain_weights(label, scheme, device):
    model = hf_paged.patch(model_of(label, scheme, device, dtype=torch.bfloat16), attention_backend="triton")
    report = hf_paged.explain(model)
    assert report.fused["attention"] == report.fused["layer"] == 1 and not report.fallbacks
    merges = sum("merge" in name for name in report.launches)
    assert len(report.launches) + (1 - merges) <= 7, report.launches  # a sequence may be attended to in one piece
    assert [entry.kernel for entry in report.weights] == ["triton"]


@pytest.mark.parametrize(("scheme", "num_rows"), [("int4-zeros-order", 3), ("w8a8", 40)])
def test_a_layer_is_as_near_to_the_truth_as_its_own_forward(scheme, num_rows, device):
    model = model_of("llama", scheme, device, dtype=torch.bfloat16)
    layer = model.model.layers[0]
    with as_in_a_step(device):
        fuse_layers(model, fuse(model, "triton"), 512)
        state = layer._hf_paged
        positions = torch.arange(num_rows, device=device)
        x = torch.randn(1, num_rows, 48, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
        places = {"position_embeddings": model.model.rotary_emb(x, positions[None]), "position_ids": positions[None]}
        call = dataclasses.replace(state.call, arguments={**state.call.arguments, **places})
        trial = Trial(layer, call, x, lambda result: result, positions, "triton")
        assert trial.difference(state.run) is None
        layer.input_layernorm._hf_paged["eps"] = 0.1
        assert trial.difference(state.run) == "query"


def test_tokens_are_the_dequantized_models(device):
    """In fp32, through the engine: chunks of a prompt beside decodes."""
    model = model_of("qwen3", "int4-zeros-order", device)
    twin = dequantized(model)
    expected = [twin.generate(torch.tensor([p], device=device), max_new_tokens=8, do_sample=False) for p in PROMPTS]
    config = hf_paged.EngineConfig(attention_backend="triton", max_batch_tokens=16)
    with hf_paged.Engine(model, config=config) as engine:
        outputs = engine.generate(PROMPTS, GREEDY)
    for prompt, output, ids in zip(PROMPTS, outputs, expected):
        assert prompt + output.outputs[0].token_ids == ids[0].tolist()


@pytest.mark.parametrize("act_order", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_quantized_experts_have_the_tokens_of_the_dequantized_ones(device, tmp_path, act_order):
    """Stacked, and one after the other where every expert has an order of its own."""
    expected = tiny_model("qwen3_moe", num_hidden_layers=1, hidden_size=64, layer_types=None)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": act_order, "sym": False}
    save_quantized(expected, tmp_path, config, lambda name, N, K: gptq_layer(N, K, act_order=act_order))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval().to(device)
    with hf_paged.Engine(model, config=hf_paged.EngineConfig(attention_backend="triton")) as engine:
        outputs = engine.generate(PROMPTS, hf_paged.SamplingParams(temperature=0, max_tokens=3))
        report = hf_paged.explain(model)
    assert {entry.kernel for entry in report.weights} == {"triton"}
    assert report.fused.get("experts", 0) == 1 - act_order and bool(report.fallbacks) == act_order
    for prompt, output in zip(PROMPTS, outputs):
        ids = expected.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)
        assert prompt + output.outputs[0].token_ids == ids[0].tolist()


def test_experts_that_round_their_inputs(device, tmp_path):
    """Both products of fp8 experts, on the kernels and on the reference."""
    source = tiny_model("qwen3_moe", num_hidden_layers=1, hidden_size=64, layer_types=None)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    make = lambda name, N, K: eight_bit_layer(N, K, block=(16, 16), name="weight_scale_inv")  # noqa: E731
    save_quantized(source, tmp_path, config, make)
    experts = AutoModelForCausalLM.from_pretrained(tmp_path).to(device).model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator).to(device, torch.bfloat16)
    index = torch.rand(5, 4, generator=generator).argsort(-1)[:, :2].to(device)
    router = torch.rand(5, 2, generator=generator).to(device)
    assert experts.first.quantized.activations == "fp8"
    actual, expected = (experts.run(x, index, router, backend).float() for backend in ("triton", "reference"))
    assert (actual - expected).norm() < 0.02 * expected.norm()
