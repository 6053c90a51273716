"""What patching asks of the model itself: which positions its layers see, and whether packed batches give its logits."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from transformers.models.llama import modeling_llama

import hf_paged
from hf_paged import UnsupportedModel
from hf_paged.hf import supported
from hf_paged.hf.patch import patch_of
from hf_paged.runtime.batch import StepContext


def rules(model) -> list[tuple]:
    """(layer, window, chunk) of every attention of the patched model."""
    hf_paged.patch(model)
    found = [(spec.layer_idx, spec.window, spec.chunk) for spec in patch_of(model).adapter.layers]
    hf_paged.unpatch(model)
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("llama", [(0, None, None), (1, None, None), (2, None, None)]),
        ("mistral-window", [(0, 19, None), (1, 19, None), (2, 19, None)]),
        ("phimoe", [(0, 19, None), (1, 19, None), (2, 19, None)]),  # tells its attention function nothing of it
        ("qwen2_moe-window", [(0, 19, None), (1, None, None), (2, 19, None)]),
        ("llama4_text", [(0, None, 22), (1, None, None), (2, None, 22)]),
        ("diffllama", [(layer, None, None) for layer in (0, 0, 1, 1, 2, 2)]),  # attends twice in a layer
    ],
)
def test_windows_and_chunks_are_read_off_the_masks(label, expected, attention):
    model = tiny_model(label)
    model.set_attn_implementation(attention)
    assert rules(model) == expected


def test_windows_that_no_short_forward_reaches_are_told_apart():
    assert rules(tiny_model("mistral", sliding_window=4096)) == [(layer, 4096, None) for layer in range(3)]
    chunked = tiny_model("llama4_text", attention_chunk_size=8192)
    assert rules(chunked) == [(0, None, 8192), (1, None, None), (2, None, 8192)]


def test_explain_names_chunks():
    model = tiny_model("llama4_text")
    assert "chunks of 22" in str(hf_paged.explain(hf_paged.patch(model)))


def test_it_runs_under_any_configuration():
    model = tiny_model("mistral-window")
    smallest = dict(max_queue=1, max_num_seqs=1, max_batch_tokens=1, max_model_len=4)
    hf_paged.patch(model, **smallest, block_size=64, kv_dtype="float16")
    hf_paged.unpatch(model)


def refusal(model) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModel) as caught:
        hf_paged.patch(model)
    assert not hasattr(model, "_hf_paged")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(caught.value)


def test_a_mask_of_its_own_is_refused(monkeypatch):
    def plain(inputs_embeds, **kwargs):
        return torch.ones(1, 1, inputs_embeds.shape[1], inputs_embeds.shape[1]).bool().tril()

    monkeypatch.setattr(modeling_llama, "create_causal_mask", plain)
    assert "builds its own attention mask" in refusal(tiny_model("llama"))


def test_another_rule_than_we_know_is_refused(monkeypatch):
    right = modeling_llama.create_causal_mask

    def every_third(**kwargs):
        return right(**kwargs, and_mask_function=lambda batch, head, query, key: (query - key) % 3 == 0)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", every_third)
    assert "neither causal" in refusal(tiny_model("llama"))


def test_more_than_queries_keys_and_values_is_refused(monkeypatch):
    right = modeling_llama.LlamaDecoderLayer.forward

    def with_bias(self, hidden_states, **kwargs):
        return right(self, hidden_states, **kwargs, position_bias=torch.zeros(1))

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", with_bias)
    assert "'position_bias'" in refusal(tiny_model("llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_counted_across_sequences_are_refused(monkeypatch, dtype):
    right = modeling_llama.LlamaModel.forward

    def by_row(self, input_ids, position_ids=None, **kwargs):
        return right(self, input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", by_row)
    assert "other logits in packed batches" in refusal(tiny_model("llama", dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_from_row_to_row_is_refused(monkeypatch, dtype):
    right = modeling_llama.LlamaMLP.forward

    def with_neighbour(self, x):
        return right(self, x) + x.roll(1, dims=1)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", with_neighbour)
    assert "other logits in packed batches" in refusal(tiny_model("llama", dtype=dtype))


def test_a_wrong_kernel_is_refused(monkeypatch):
    right = StepContext.attend_rotary
    monkeypatch.setattr(StepContext, "attend_rotary", lambda self, *args, **kwargs: right(self, *args, **kwargs) * 1.01)
    assert "other logits in packed batches" in refusal(tiny_model("llama"))


def test_a_setting_that_changes_what_a_family_keeps_is_refused(monkeypatch):
    monkeypatch.setattr(supported, "REFUSED_SETTINGS", {"llama": {"mlp_bias": (True, "it is a test")}})
    assert "config.mlp_bias=True is not supported: it is a test" in refusal(tiny_model("llama-mha-bias"))
    hf_paged.unpatch(hf_paged.patch(tiny_model("llama")))
