"""Decoder layers on Triton: how many kernels one launches, and that its results are the model's own."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from tiny_models import tiny_model

import hf_paged
from hf_paged.hf.fusion import fuse, fuse_layers
from hf_paged.hf.fusion.trial import Trial
from hf_paged.runtime.runner import as_in_a_step


@pytest.mark.parametrize("label", ["llama", "qwen3"])
def test_a_layer_launches_at_most_eight_kernels_for_a_token(label, device):
    model = tiny_model(label, dtype=torch.bfloat16, num_hidden_layers=1, layer_types=None).to(device)
    hf_paged.patch(model, attention_backend="triton")
    report = hf_paged.explain(model)
    assert report.fused["attention"] == report.fused["layer"] == 1 and not report.fallbacks
    merges = sum("merge" in name for name in report.launches)
    assert 5 <= len(report.launches) + (1 - merges) <= 8  # so short a sequence may be attended to in one piece
    assert f"kernels {len(report.launches)} a layer" in str(report)


@pytest.mark.parametrize(("label", "num_rows"), [("llama", 3), ("llama", 40), ("gemma2", 40), ("mixtral", 40)])
def test_a_layer_is_as_near_to_the_truth_as_its_own_forward(label, num_rows, device):
    """Few rows, where a projection takes in its norm and its sum, and many, where others do; and experts after both."""
    model = tiny_model(label, dtype=torch.bfloat16, num_hidden_layers=1, layer_types=None).to(device)
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


def test_parts_of_other_layers_are_fused_one_by_one(device):
    """Layer norms, and a subclass of nn.Linear that computes the same."""
    for label, parts in ("starcoder2", {"layer_norm": 3, "attention": 1}), ("falcon", {"layer_norm": 2, "linear": 5}):
        model = tiny_model(label, dtype=torch.bfloat16, num_hidden_layers=1, layer_types=None).to(device)
        with as_in_a_step(device):
            fusions = fuse(model, "triton")
            fuse_layers(model, fusions, 512)
        assert parts.items() <= fusions.counts.items(), fusions.counts


def test_tokens_are_stock_s(device):
    """In fp32, through the engine: chunks of a prompt beside decodes."""
    model = tiny_model("qwen3", num_hidden_layers=1, layer_types=None).to(device)
    prompts = [[5, 6, 7], list(range(20, 41))]
    expected = [
        copy.deepcopy(model).generate(torch.tensor([prompt], device=device), max_new_tokens=4, do_sample=False)
        for prompt in prompts
    ]
    config = hf_paged.EngineConfig(attention_backend="triton", max_batch_tokens=16)
    with hf_paged.Engine(model, config=config) as engine:
        params = hf_paged.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        outputs = engine.generate(prompts, params)
    for prompt, output, ids in zip(prompts, outputs, expected):
        assert prompt + output.outputs[0].token_ids == ids[0].tolist()
