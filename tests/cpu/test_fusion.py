"""Fused attention modules and decoder layers: which are, that nothing changes by it, and when they step aside."""

from __future__ import annotations

import copy

import pytest
import torch
from fusion_checks import GREEDY, PROMPTS, fused, outputs, stock_tokens, tokens
from tiny_models import tiny_model
from transformers.models.llama import modeling_llama

import hf_paged
from hf_paged import Engine, EngineConfig
from hf_paged.hf import patch as patch_module
from hf_paged.hf.fusion import proof
from hf_paged_kernels.ref import elementwise


@pytest.mark.parametrize(
    "label",
    ["llama", "llama-mha-bias", "llama-tied-llama3-rope", "mistral-window", "qwen2-window", "qwen3", "gemma", "gemma2",
     "phi3", "phi3-window", "mixtral-window", "qwen3_moe", "smollm3", "gpt_oss"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_layers_have_the_bits_of_their_parts(monkeypatch, label, dtype):
    """Attention with and without biases, windows, softcap, sinks, norms of heads, rotary embedding; experts."""
    model = tiny_model(label, dtype=dtype)
    whole = outputs(model)
    assert fused(model) == (model.config.num_hidden_layers,) * 2
    monkeypatch.setattr(patch_module, "fuse_layers", lambda *args: None)
    assert outputs(model) == whole and fused(model) == (0, 0)


@pytest.mark.parametrize(
    ("label", "options", "counts", "reason"),
    [
        ("olmo2", {}, (0, 0), "not norms of heads"),
        ("cohere", {}, (0, 0), "query is computed otherwise"),  # interleaved rotary embedding
        ("granite", dict(residual_multiplier=0.5, attention_multiplier=0.4), (3, 0), "output is computed otherwise"),
        ("ministral3-temperature", {}, (0, 0), "query is computed otherwise"),  # a scale that grows after 16 positions
        ("starcoder2", {}, (3, 0), "norms are not fused"),
    ],
)
def test_what_is_not_the_standard_form_is_left_alone(label, options, counts, reason):
    model = tiny_model(label, **options)
    expected = stock_tokens(model)
    assert tokens(model) == expected
    assert fused(model) == counts
    report = hf_paged.explain(model)
    assert any(reason in why for why in report.alone.values()) and f"alone   {next(iter(report.alone))}" in str(report)


@pytest.mark.parametrize("change", ["clamped", "scaled"])
def test_code_that_computes_more_is_left_alone(monkeypatch, change):
    right = modeling_llama.apply_rotary_pos_emb

    def more(q, k, cos, sin):
        q, k = right(q, k, cos, sin)
        return (q.clamp(-6, 6), k) if change == "clamped" else (q, k * 1.001)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", more)
    model = tiny_model("llama")
    expected = stock_tokens(model)
    assert tokens(model) == expected and fused(model) == (0, 0)


def bend(module, args, output):
    first = output[0] if isinstance(output, tuple) else output
    bent = first * torch.linspace(-1, 1.5, first.shape[-1])
    return (bent, *output[1:]) if isinstance(output, tuple) else bent


@pytest.mark.parametrize(
    ("name", "aside"),
    [
        ("input_layernorm", {"layer"}),
        ("post_attention_layernorm", {"layer"}),
        ("self_attn", {"layer"}),
        ("self_attn.q_norm", {"attention", "layer"}),
        ("self_attn.k_proj", set()),
        ("self_attn.o_proj", set()),
        ("mlp", set()),
        ("mlp.act_fn", {"mlp"}),
        ("mlp.up_proj", {"mlp"}),
        ("mlp.down_proj", set()),
        ("", set()),
    ],
)
def test_a_hook_acts_as_in_stock_and_only_its_layer_steps_aside(name, aside):
    model = tiny_model("qwen3")
    plain = stock_tokens(model)
    path = f"model.layers.1.{name}".rstrip(".")
    handle = model.get_submodule(path).register_forward_hook(bend)
    expected = stock_tokens(model)
    handle.remove()
    assert tokens(model) == plain != expected
    handle = model.get_submodule(path).register_forward_hook(bend)
    assert [output.outputs[0].token_ids for output in hf_paged.engine_of(model).generate(PROMPTS, GREEDY)] == expected
    off = {kind.removeprefix("fused "): text for kind, text in hf_paged.explain(model).off.items() if "fused" in kind}
    assert set(off) == aside and all("layers.1" in text and "layers.0" not in text for text in off.values())
    handle.remove()
    assert not any("fused" in kind for kind in hf_paged.explain(model).off)
    assert [output.outputs[0].token_ids for output in hf_paged.engine_of(model).generate(PROMPTS, GREEDY)] == plain


@pytest.mark.parametrize("name", ["input_layernorm", "self_attn.q_norm", "self_attn.o_proj", "mlp", "mlp.down_proj"])
def test_a_replaced_part_runs(name):
    model = tiny_model("qwen3")
    before = tokens(model)
    other = tiny_model("qwen3", seed=8)
    model.model.layers[2].set_submodule(name, other.model.layers[2].get_submodule(name))
    expected = stock_tokens(copy.deepcopy(model))
    assert [output.outputs[0].token_ids for output in hf_paged.engine_of(model).generate(PROMPTS, GREEDY)] == expected
    assert expected != before


def test_a_norm_that_is_cast_runs_itself():
    """As training recipes do that keep norms in fp32."""
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    expected = tokens(model)
    for name in ("input_layernorm", "self_attn.q_norm"):
        model.model.layers[1].get_submodule(name).float()
    stock = copy.deepcopy(model)
    with pytest.raises(RuntimeError):  # transformers' own attention does not take them in bf16
        stock_tokens(stock)
    assert "fused layer" in hf_paged.explain(model).off


def test_recorders_of_transformers_leave_layers_fused():
    model = tiny_model("llama")
    ids = torch.tensor([PROMPTS[1]])
    options = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_hidden_states=True)
    expected = model.generate(ids, **options)
    hf_paged.patch(model)
    result = model.generate(ids, **options)
    for mine, theirs in zip(result.hidden_states, expected.hidden_states):
        for layer, stock in zip(mine, theirs):
            torch.testing.assert_close(layer, stock, atol=1e-4, rtol=1e-4)
    assert fused(model) == (3, 3) and not hf_paged.explain(model).off


def test_another_implementation_of_attention_counts_at_once():
    """"eager" has the softcap that "sdpa" ignores in some releases."""
    model = tiny_model("gemma2", attn_logit_softcapping=0.3)
    outputs(model)
    for implementation in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
        model.set_attn_implementation(implementation)
        expected = stock_tokens(copy.deepcopy(model))
        hf_paged.engine_of(model).reset_prefix_cache()
        assert [output.outputs[0].token_ids for output in hf_paged.engine_of(model).generate(PROMPTS, GREEDY)] == expected


def test_without_fuse_nothing_is_swapped():
    model = tiny_model("llama")
    assert tokens(hf_paged.patch(model)) == [ids for ids, _ in outputs(model, fuse=False)]
    assert fused(model) == (0, 0)
    with Engine(tiny_model("llama"), config=EngineConfig(strict=True)) as engine:
        assert engine.generate(PROMPTS[:1], GREEDY)[0].error is None


class TestAgreement:
    """The rule by which fused forms are kept, on an RMS norm."""

    x = proof.random_rows(64, torch.empty(0, dtype=torch.bfloat16))
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def norm(self, x, eps=1e-6, offset=0.0, cast="weight_after"):
        return elementwise.rms_norm(x, self.weight.to(x.dtype), eps, offset=offset, cast=cast)

    def agree(self, actual, **options):
        own = self.norm(self.x)
        return proof.agree(actual, own, truth=lambda: self.norm(self.x.float()), **options)

    def test_on_cpu_narrow_types_need_the_same_bits(self):
        assert self.agree(self.norm(self.x))
        assert not self.agree(self.norm(self.x, cast="weight_before"))

    def test_on_triton_what_is_as_near_to_the_truth_will_do(self):
        nearer = self.norm(self.x.float()).bfloat16()
        for result in nearer, self.norm(self.x, cast="weight_before"):
            assert not torch.equal(result, self.norm(self.x)) and self.agree(result, backend="triton")

    @pytest.mark.parametrize("wrong", [dict(eps=2e-6), dict(eps=1e-5), dict(offset=1.0)])
    def test_on_triton_what_is_farther_will_not(self, wrong):
        """An epsilon of twice the size shows on the rows of 1e-4 alone."""
        assert not self.agree(self.norm(self.x.float(), **wrong).bfloat16(), backend="triton")

    def test_on_triton_one_wrong_row_of_all_is_enough(self):
        result = self.norm(self.x)
        result[3] *= 1.02
        assert not self.agree(result, backend="triton")
        result[3] = float("nan")
        assert not self.agree(result, backend="triton")

    def test_fp32_needs_the_tolerance_anywhere(self):
        x = self.x.float()
        own = self.norm(x)
        assert proof.agree(own * (1 + 1e-6), own, backend="triton")
        assert not proof.agree(own * (1 + 1e-5), own, backend="triton")
        assert not proof.agree(own[:, :32], own) and not proof.agree(own.bfloat16(), own)
