"""Models quantized by other packages, the real ones: their own layers under the engine, with stock's tokens.

Run by `make test-quantizers`, in an environment that has these packages; `make test` does not collect this file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchao.quantization as torchao
from foreign_modules import replace_linears
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from transformers.integrations.bitnet import AutoBitLinear, BitLinear

import hf_paged

SIZES = dict(hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=2)
PROMPTS = torch.tensor([[5, 9, 11, 40, 7, 8, 9, 10, 11, 12, 13, 14], [0, 0, 0, 0, 99, 3, 4, 77, 23, 45, 67, 12]])
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("float")
    tiny_model("llama", **SIZES).save_pretrained(path)
    return path


def loaded(config) -> Callable:
    """transformers' own way: the checkpoint is quantized as it is loaded."""

    def load(folder: Path, dtype: torch.dtype) -> nn.Module:
        made = config(dtype) if callable(config) else config
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=made, dtype=dtype, device_map="cpu").eval()

    return load


def replaced(make) -> Callable:
    """For packages whose way through this transformers is closed: their layers, put in place."""

    def load(folder: Path, dtype: torch.dtype) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return replace_linears(model, lambda layer: make(layer, dtype)).eval()

    return load


def _hqq(bits: int):
    def make(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        config = BaseQuantizeConfig(nbits=bits, group_size=64)
        return HQQLinear(layer, config, compute_dtype=dtype, device="cpu", del_orig=False)

    return make


def _bitnet(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    new = BitLinear(layer.in_features, layer.out_features, bias=False, device="cpu", dtype=dtype)
    new.weight.random_(0, 3**4)
    return new


def _autobitnet(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    new = AutoBitLinear(layer.in_features, layer.out_features, bias=False, online_quant=True).to(dtype)
    new.weight = layer.weight
    return new


def _bnb4(**options):
    return lambda dtype: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **options)


WAYS: dict[str, Callable] = {
    "bitsandbytes nf4": loaded(_bnb4(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
    "bitsandbytes fp4": loaded(_bnb4(bnb_4bit_quant_type="fp4")),
    "bitsandbytes int8": loaded(BitsAndBytesConfig(load_in_8bit=True)),
    "hqq 4 bit": replaced(_hqq(4)),
    "hqq 2 bit": replaced(_hqq(2)),
    "quanto int8": loaded(QuantoConfig(weights="int8")),
    "quanto int4": loaded(QuantoConfig(weights="int4")),
    "quanto float8": loaded(QuantoConfig(weights="float8")),
    "torchao int8": loaded(TorchAoConfig(quant_type=torchao.Int8WeightOnlyConfig())),
    "torchao W8A8": loaded(TorchAoConfig(quant_type=torchao.Int8DynamicActivationInt8WeightConfig())),
    "torchao float8": loaded(TorchAoConfig(quant_type=torchao.Float8WeightOnlyConfig())),
    "torchao intx": loaded(TorchAoConfig(quant_type=torchao.IntxWeightOnlyConfig())),
    "bitnet packed": replaced(_bitnet),
    "bitnet online": replaced(_autobitnet),
}


def greedy(model: nn.Module) -> torch.Tensor:
    return model.generate(input_ids=PROMPTS, attention_mask=(PROMPTS != 0).long(), max_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_stocks(way, folder):
    model = WAYS[way](folder, torch.float32)
    kinds = {type(module) for module in model.modules()}
    expected = greedy(model)
    hf_paged.patch(model)
    assert torch.equal(greedy(model), expected)
    assert hf_paged.engine_of(model).stats()["steps"] > 0
    hf_paged.unpatch(model)
    assert {type(module) for module in model.modules()} == kinds
    assert torch.equal(greedy(model), expected)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("hqq 2 bit", "bitnet packed")])
def test_in_bf16_the_packed_forward_is_the_models_own(way, folder):
    model = WAYS[way](folder, torch.bfloat16)
    hf_paged.patch(model)  # compares packed batches with the model's own forward
    assert hf_paged.engine_of(model).model.dtype == torch.bfloat16
    assert greedy(model).shape == (2, PROMPTS.shape[1] + NEW)


def test_gguf_files_are_loaded_as_ever():
    """transformers unpacks them as they are loaded where it has no kernel for their blocks."""
    from hf_paged.hf.build import load_model

    model = load_model()[0]
    expected = greedy(model)
    hf_paged.patch(model)
    assert torch.equal(greedy(model), expected)
