"""Checkpoints that we write, and layers made by hand, as the tools that made these formats read them.

Run by `make test-quantizers`, in an environment that has the tools; `make test` does not collect this file.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from quantized_checkpoints import awq_layer, gptq_layer, packed_layer, packed_layer_of_ct, save_quantized
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.quant.formats.awq import AWQ
from hf_paged.quant.formats.compressed_tensors import PackQuantized
from hf_paged.quant.formats.gptq import GPTQ
from hf_paged.quant.linear import QuantLinear


def without_init(package: str) -> None:
    """Make a package's modules importable without what the package itself imports, which fails beside transformers 5."""
    stub = ModuleType(package)
    stub.__path__ = list(find_spec(package).submodule_search_locations)
    sys.modules[package] = stub


for package in ("auto_gptq", "awq", "awq.utils"):
    without_init(package)
auto_gptq = import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
awq = import_module("awq.utils.packing_utils")

N, K = 96, 128
PROMPT = torch.tensor([[5, 9, 11, 40, 7, 8, 9, 10, 11, 12, 13, 14]])
SIZES = dict(hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=2)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_auto_gptq_reads_a_layer_as_we_do(bits, sym, act_order):
    tensors, weight = gptq_layer(N, K, bits=bits, group_size=32, sym=sym, act_order=act_order)
    mine = packed_layer(GPTQ(bits, 32), tensors, N, K)
    saved = mine.state_dict()
    theirs = auto_gptq.QuantLinear(bits, 32, K, N, bias=False)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        getattr(theirs, name).copy_(saved[name])
    dequantized = theirs(torch.eye(K).half()).T.float()
    torch.testing.assert_close(dequantized, mine.dequantize(), rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(mine.dequantize(), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_reads_a_layer_as_we_do(bits, sym, act_order, version):
    tensors, weight = gptq_layer(N, K, bits=bits, group_size=32, sym=sym, act_order=act_order, version=version)
    mine = packed_layer(GPTQ(bits, 32, version, whole_words=version == "gptq"), tensors, N, K)
    saved = mine.state_dict()
    theirs = TorchLinear(bits, 32, sym, act_order, K, N)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        getattr(theirs, name).copy_(saved[name])
    if version == "gptq":
        convert_gptq_v1_to_v2_format_module(theirs, bits, torch.int32)
    theirs.post_init()
    torch.testing.assert_close(theirs.dequantize_weight().T.float(), mine.dequantize(), rtol=2e-3, atol=1e-5)
    if version == "gptq_v2":
        torch.testing.assert_close(mine.dequantize(), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("group_size", [32, 128])
def test_autoawq_reads_a_layer_as_we_do(group_size):
    tensors, weight = awq_layer(N, K, group_size=group_size)
    mine = packed_layer(AWQ(group_size), tensors, N, K)
    saved = mine.state_dict()
    dequantized = awq.dequantize_gemm(saved["qweight"], saved["qzeros"], saved["scales"], 4, group_size).T.float()
    torch.testing.assert_close(dequantized, mine.dequantize(), rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(mine.dequantize(), weight, rtol=1e-6, atol=0)


@contextmanager
def with_their_quantizers():
    hf_paged.unregister_quantizers()
    try:
        yield
    finally:
        hf_paged.register_quantizers()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_reads_a_packed_layer_as_we_do(bits, symmetric):
    tensors, weight = packed_layer_of_ct(N, K, bits=bits, group_size=32, sym=symmetric, dtype=torch.float32)
    mine = packed_layer(PackQuantized(bits, 32, symmetric), tensors, N, K)
    weights = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=32, symmetric=symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    theirs = PackedQuantizationCompressor.decompress(dict(mine.state_dict()), scheme)["weight"]
    torch.testing.assert_close(theirs, mine.dequantize(), rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.dequantize(), weight, rtol=1e-6, atol=0)


def test_transformers_with_compressed_tensors_reads_a_checkpoint_as_we_do(tmp_path):
    weights = dict(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
    group = dict(targets=["Linear"], weights=weights, input_activations=None, output_activations=None)
    config = dict(quant_method="compressed-tensors", format="pack-quantized", quantization_status="compressed",
                  ignore=["lm_head"], config_groups=dict(group_0=group))  # fmt: skip
    model = tiny_model("llama", **SIZES)
    save_quantized(model, tmp_path, config, lambda name, N, K: packed_layer_of_ct(N, K, group_size=32))
    mine = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with with_their_quantizers():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not any(isinstance(module, QuantLinear) for module in theirs.modules())
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-3, atol=1e-3)
    expected = theirs.generate(PROMPT, max_new_tokens=8, do_sample=False)
    hf_paged.patch(theirs)  # their layers under the engine
    assert torch.equal(theirs.generate(PROMPT, max_new_tokens=8, do_sample=False), expected)


def test_compressed_tensors_reads_what_we_save_as_fp8(tmp_path):
    model = tiny_model("llama", **SIZES)
    hf_paged.unpatch(hf_paged.patch(model, quantization="fp8"))
    model.save_pretrained(tmp_path)
    mine = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(mine), logits(model))
    with with_their_quantizers():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    layer, own = theirs.model.layers[0].mlp.down_proj, mine.model.layers[0].mlp.down_proj
    weight = layer.weight.float() * layer.weight_scale.float() if layer.weight.itemsize == 1 else layer.weight.float()
    torch.testing.assert_close(weight, own.dequantize(), rtol=1e-5, atol=0)
