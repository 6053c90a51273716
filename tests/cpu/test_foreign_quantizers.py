"""Models quantized by other packages run their own layers' forwards under the engine, and say what stock says."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign_modules import KINDS, OutlierLinear, PackedEmbedding, QWeightLinear, linears_of, quantize, replace_linears
from tiny_models import tiny_model

import hf_paged
from hf_paged import Engine, SamplingParams

PROMPT = torch.tensor([[5, 9, 11, 40, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20] * 2])
NEW = 8


def greedy(model) -> torch.Tensor:
    return model.generate(input_ids=PROMPT, max_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_stocks_and_come_from_the_layers_own_forwards(kind, family):
    model, counter = tiny_model(family), KINDS[kind][1]
    count = linears_of(model)
    expected = greedy(quantize(model, kind))
    hf_paged.patch(model)
    counter.calls = 0
    assert torch.equal(greedy(model), expected)
    assert counter.calls == count * NEW  # of every layer in every step
    hf_paged.unpatch(model)
    assert torch.equal(greedy(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_in_16_bits_the_packed_forward_is_the_models_own(kind, dtype):
    model = quantize(tiny_model("llama", dtype=dtype), kind)
    hf_paged.patch(model, verify=True)
    assert hf_paged.engine_of(model).model.dtype == dtype
    assert greedy(model).shape == (1, PROMPT.shape[1] + NEW)


@pytest.mark.parametrize("kind", KINDS)
def test_values_written_into_a_quantized_weight_reach_the_next_token(kind):
    model, other = (quantize(tiny_model("llama", seed=seed), kind) for seed in (0, 1))
    hf_paged.patch(model)
    greedy(model)
    layer, source = (each.model.layers[0].mlp.down_proj for each in (model, other))
    with torch.no_grad():
        for mine, new in zip(tensors(layer), tensors(source), strict=True):
            mine.data.copy_(new)  # seen by no counter of writes
    assert torch.equal(greedy(model), greedy(copy_of(model)))
    hf_paged.unpatch(model)


def tensors(layer) -> list[torch.Tensor]:
    weight = getattr(layer, "weight", None)
    if hasattr(weight, "__tensor_flatten__"):
        return [weight.values, weight.scale]
    return [*layer.parameters(), *layer.buffers(), *([layer.scale] if hasattr(layer, "scale") else [])]


def copy_of(model):
    """An unpatched model of the same values."""
    fresh = quantize(tiny_model("llama"), next(kind for kind in KINDS if uses(model, kind)))
    fresh.model.layers[0].mlp.down_proj = copy.copy(model.model.layers[0].mlp.down_proj)
    return fresh


def uses(model, kind) -> bool:
    layer, type_ = model.model.layers[0].mlp.down_proj, KINDS[kind][1]
    return isinstance(layer, type_) or isinstance(getattr(layer, "weight", None), type_)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_embedding(dtype):
    model = quantize(tiny_model("llama", dtype=dtype), "qweight")
    model.set_input_embeddings(PackedEmbedding(model.get_input_embeddings().weight))
    expected = greedy(model)
    with Engine(model) as engine:
        assert engine.model.dtype == dtype and engine.model.vocab_size == model.config.vocab_size
        output = engine.generate([PROMPT[0].tolist()], SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
        if dtype == torch.float32:
            assert output[0].outputs[0].token_ids == expected[0, PROMPT.shape[1] :].tolist()
    hf_paged.patch(model, verify=True)
    hf_paged.unpatch(model)


def test_a_layer_quantized_while_the_model_is_patched():
    model = tiny_model("llama")
    hf_paged.patch(model)
    greedy(model)
    quantize(model, "wrapper tensor")
    expected = greedy(quantize(tiny_model("llama"), "wrapper tensor"))
    assert torch.equal(greedy(model), expected)


def test_layers_that_round_activations_across_the_batch_are_narrow():
    model = replace_linears(tiny_model("llama"), OutlierLinear.of)
    hf_paged.patch(model)
    scatter = hf_paged.hf.patch.patch_of(model).scatter
    assert 1e-3 < scatter < 0.5
    assert "round what they are given" in str(hf_paged.explain(model))
    assert greedy(model).shape == (1, PROMPT.shape[1] + NEW)
    hf_paged.patch(replace_linears(hf_paged.unpatch(model), QWeightLinear.of))  # no longer so
    assert "round what they are given" not in str(hf_paged.explain(model))
