"""Multi-head latent attention with latents in pages, against stock transformers in fp32."""

from __future__ import annotations

import copy

import pytest
import torch
from family_checks import Comparison
from tiny_models import tiny_model

import hf_paged
import hf_paged_kernels as kernels
from hf_paged import EngineConfig, KernelUnavailable, SamplingParams

LABELS = ["deepseek_v2", "deepseek_v3-no-q-lora", "longcat_flash", "youtu"]
IDS = torch.tensor([[5, 9, 11, 40, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]])


@pytest.fixture(scope="module", params=LABELS)
def family(request):
    return Comparison(tiny_model(request.param))


def test_tokens_vary(family):
    family.check_is_telling()


def test_chunked_prefill_mixed_with_decodes_and_prefix_hits(family):
    family.check_chunks_and_prefix_hits()


def test_preemption(family):
    family.check_preemption()


def test_reference_kernels_without_fusion(family):
    family.check_reference_kernels()


def test_generate_returns_stock_tokens_and_logits(family):
    family.check_generate()


def test_experts_that_pick_tokens_are_no_table_of_positions(family):
    limits = hf_paged.explain(hf_paged.patch(family.model)).limits
    hf_paged.unpatch(family.model)
    assert not any("table" in limit for limit in limits)


def test_caches_given_and_returned_are_stock_s(family):
    family.check_caches()


def test_outside_a_step_the_model_is_stock_s_own_bits(family):
    model = family.model

    def run(of):
        of.zero_grad()
        output = of(IDS, labels=IDS)
        output.loss.backward()
        return [output.logits.detach().clone(), *(p.grad.clone() for p in of.parameters() if p.grad is not None)]

    expected, kinds = run(model), [type(module) for module in model.modules()]
    hf_paged.patch(model)
    greedy(model)
    assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(copy.deepcopy(model)), expected, strict=True))
    hf_paged.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True))
    assert [type(module) for module in model.modules()] == kinds


def greedy(model) -> list[int]:
    return model.generate(IDS, max_new_tokens=12, do_sample=False)[0].tolist()


def attention(model, layer: int = 1):
    return model.model.layers[layer].self_attn


@pytest.fixture
def model():
    return tiny_model("deepseek_v3")


def test_pages_hold_one_latent_a_token(model):
    hf_paged.patch(model)
    config = model.config
    for layer in hf_paged.hf.patch.patch_of(model).adapter.layers:
        assert (layer.num_heads, layer.num_kv_heads) == (config.num_attention_heads, 1)
        assert layer.head_dim == config.kv_lora_rank + config.qk_rope_head_dim
        assert layer.value_dim == config.kv_lora_rank
    assert {layer.kind for layer in hf_paged.explain(model).layers} == {"full, latent (MLA)"}


def test_a_write_to_the_up_projection_reaches_the_next_token(model):
    hf_paged.patch(model)
    before = greedy(model)
    with torch.no_grad():
        attention(model).kv_b_proj.weight.mul_(-3.0)
    after = greedy(model)
    assert after == greedy(copy.deepcopy(model))
    assert after != before


def test_a_hooked_up_projection_is_called_and_explained(model):
    seen = []

    def hook(module, args, output):
        seen.append(module)
        return output * 1.5

    attention(model).kv_b_proj.register_forward_hook(hook)
    expected = greedy(model)
    hf_paged.patch(model)
    seen.clear()
    assert greedy(model) == expected
    assert seen
    explanation = hf_paged.explain(model)
    assert [layer.kind for layer in explanation.layers] == ["full, latent (MLA)", "full", "full, latent (MLA)"]
    assert "forward hook" in explanation.fallbacks["latent attention of layer 1"]
    with pytest.raises(KernelUnavailable, match="kv_b_proj has a forward hook"):
        hf_paged.patch(model, strict=True)


def test_another_up_projection_than_a_linear_layer_is_called(model):
    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    projection = attention(model).kv_b_proj
    projection.__class__ = Doubled
    expected = greedy(model)
    hf_paged.patch(model)
    assert greedy(model) == expected
    assert "Doubled" in hf_paged.explain(model).fallbacks["latent attention of layer 1"]


def test_a_hook_that_comes_while_patched_has_its_effect(model):
    hf_paged.patch(model)
    greedy(model)
    attention(model).kv_b_proj.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.warns(UserWarning, match=r"in layer 1 kv_b_proj has a forward hook .*hf_paged.patch\(model\) again"):
        mine = greedy(model)
    with pytest.raises(hf_paged.RequestFailed, match=r"in layer 1 kv_b_proj has a forward hook"):
        hf_paged.engine_of(model).generate([[5, 6, 7]], SamplingParams(max_tokens=2))
    assert greedy(hf_paged.patch(model)) == mine
    assert greedy(hf_paged.unpatch(model)) == mine


@pytest.mark.skipif(not kernels.supports("cpu", "cpu"), reason="no compiled kernels")
def test_rows_have_the_same_bits_in_every_batch():
    """Of a family without experts, whose products are torch's."""
    Comparison(tiny_model("youtu")).check_bits()


def test_bf16_stays_near_stock():
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16)
    options = dict(max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True)
    stock = model.generate(IDS, **options).logits[0]
    with hf_paged.Engine(model, config=EngineConfig()):
        paged = model.generate(IDS, **options).logits[0]
    assert (paged - stock).abs().max() <= 0.1 * stock.abs().max()


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note_text"])
def test_sparse_latent_attention_is_refused_by_name(name):
    from hf_paged.hf import supported

    assert name in supported.REASONS and name not in supported.SUPPORTED
