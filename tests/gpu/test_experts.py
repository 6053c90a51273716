"""Mixture-of-experts models on Triton: stock's tokens, and stock's own experts wherever ours do not run."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

import hf_paged
from hf_paged import SamplingParams
from hf_paged.hf.fusion import Fusions
from hf_paged.hf.fusion import experts as hf_experts
from hf_paged_kernels.triton import moe

PROMPTS = [[3, 5, 7, 11, 13], [4, 8]]
TOKENS = 3


@pytest.fixture
def launches(monkeypatch):
    """How many pairs every launch of the experts' kernel was for."""
    pairs, run = [], moe.grouped_linear

    def counted(x, weight, experts, *args, **kwargs):
        pairs.append(len(experts))
        return run(x, weight, experts, *args, **kwargs)

    monkeypatch.setattr(moe, "grouped_linear", counted)
    return pairs


def patched(name, device):
    return hf_paged.patch(tiny_model(name, num_hidden_layers=2).to(device), attention_backend="triton")


def stock_tokens(name, device):
    model = tiny_model(name, num_hidden_layers=2).to(device)
    rows = (torch.tensor([prompt], device=device) for prompt in PROMPTS)
    return [model.generate(row, max_new_tokens=TOKENS, do_sample=False)[0, row.shape[1] :].tolist() for row in rows]


def engine_tokens(model):
    outputs = hf_paged.engine_of(model).generate(PROMPTS, SamplingParams(temperature=0, max_tokens=TOKENS))
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_the_engine_has_stocks_tokens(name, device, launches):
    model = patched(name, device)
    implementation = model.config._experts_implementation
    launches.clear()
    assert engine_tokens(model) == stock_tokens(name, device)
    assert launches and model.config._experts_implementation == implementation != hf_experts.NAME
    explanation = hf_paged.explain(model)
    assert explanation.fused["experts"] == 2 and "2 experts" in str(explanation)


def test_outside_a_step_and_after_it_experts_are_the_models_own(device, launches):
    model, plain = patched("qwen3_moe", device), tiny_model("qwen3_moe", num_hidden_layers=2).to(device)
    ids = torch.tensor(PROMPTS[:1], device=device)
    launches.clear()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model(ids).logits.sum().backward()
    assert model.model.layers[0].mlp.experts.gate_up_proj.grad is not None
    hf_paged.unpatch(model)
    assert torch.equal(model(ids).logits, plain(ids).logits) and not launches


def test_a_large_batch_runs_the_models_own(device, launches, monkeypatch):
    model = patched("qwen3_moe", device)
    monkeypatch.setattr(moe, "MAX_PAIRS", 0)
    launches.clear()
    assert engine_tokens(model) == stock_tokens("qwen3_moe", device) and not launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_compute_something_else_keep_their_own(device, dtype, monkeypatch):
    model = tiny_model("qwen3_moe", dtype=dtype).to(device)
    right, wrong = Fusions("triton"), Fusions("triton")
    with torch.no_grad():
        hf_experts.fuse_experts(model, right)
        monkeypatch.setitem(hf_experts.ACTIVATIONS, type(model.model.layers[0].mlp.experts.act_fn).__name__, "gelu")
        hf_experts.fuse_experts(model, wrong)
    assert right.expert_configs == [model.config] and right.counts["experts"] == 3 and not right.notes
    assert wrong.expert_configs == [] and "act(gate) * up" in wrong.notes["Qwen3MoeExperts"]


def test_the_name_outside_hf_paged_means_the_models_own_code(device):
    model, plain = (tiny_model("mixtral", num_hidden_layers=2).to(device) for _ in range(2))
    model.set_experts_implementation(hf_experts.NAME)
    plain.set_experts_implementation("eager")
    ids = torch.tensor(PROMPTS[:1], device=device)
    assert torch.equal(model(ids).logits, plain(ids).logits)
