"""Layers stored in 8 bits: one scale, channels, groups and blocks with ragged edges, in all shapes, under all names."""

from __future__ import annotations

import pytest
import torch
from quantized_checkpoints import assert_layer, eight_bit_layer, packed_layer

from hf_paged import InvalidArgument
from hf_paged.quant.formats.eight_bit import EightBit
from hf_paged.quant.formats.fp8 import fp8_format

N, K = 72, 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(
    "block, shape",
    [
        ((None, None), ()),
        ((None, None), (1,)),
        ((None, None), (1, 1)),
        ((1, None), (N,)),
        ((1, None), (N, 1)),
        ((1, 25), (N, 4)),
        ((8, 20), (9, 5)),
        ((32, 64), (3, 2)),
        ((128, 128), (1, 1)),
    ],
)
def test_every_kind(kind, block, shape, dtype):
    tensors, weight = eight_bit_layer(N, K, kind=kind, block=block, shape=shape, dtype=dtype)
    layer = assert_layer(EightBit(kind, block, scale_dims=len(shape)), tensors, weight)
    assert layer.quantized.data.data_ptr() == tensors["weight"].data_ptr()  # no second copy


@pytest.mark.parametrize("block, shape", [((1, None), (N, 1)), ((1, 25), (N, 4)), ((None, None), (1,))])
def test_zero_points(block, shape):
    tensors, weight = eight_bit_layer(N, K, kind="int8", block=block, shape=shape, asym=True)
    tensors["weight_zero_point"] = tensors["weight_zero_point"].reshape(shape)
    layer = assert_layer(EightBit("int8", block, scale_dims=len(shape)), tensors, weight)
    assert layer.quantized.zeros is not None


def test_zero_points_of_zero_are_none():
    tensors, weight = eight_bit_layer(N, K, kind="int8")
    layer = packed_layer(EightBit("int8"), tensors | {"weight_zero_point": torch.zeros(N, 1, dtype=torch.int8)}, N, K)
    assert layer.quantized.zeros is None and torch.equal(layer.dequantize(), weight)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_activations(shape, dtype):
    tensors, weight = eight_bit_layer(N, K)
    tensors["input_scale"] = torch.full(shape, 0.037, dtype=dtype)
    format = EightBit("fp8", activations="fp8", input_scale="input_scale", input_dims=len(shape), input_dtype=dtype)
    layer = assert_layer(format, tensors, weight)
    assert layer.quantized.input_scale.tolist() == tensors["input_scale"].reshape(1).tolist()


def test_scales_that_are_powers_of_two():
    exponents = torch.tensor([[0, -3], [2, -126], [-1, 5]])
    scale = torch.pow(2.0, exponents).to(torch.float8_e8m0fnu)
    values = torch.randn(N, K).to(torch.float8_e4m3fn)
    tensors = {"weight": values, "weight_scale_inv": scale}
    spread = (2.0**exponents).repeat_interleave(32, 0)[:N].repeat_interleave(64, 1)[:, :K]
    format = fp8_format({"weight_block_size": [32, 64], "scale_fmt": "ue8m0"}, tensors)
    assert_layer(format, tensors, values.float() * spread)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
@pytest.mark.parametrize(
    "config, shape, block",
    [
        ({}, (), (None, None)),
        ({"weight_block_size": None}, (1,), (None, None)),
        ({}, (N, 1), (1, None)),
        ({"weight_block_size": [32, 64]}, (3, 2), (32, 64)),
        ({"weight_block_size": [128, 128]}, (1, 1), (128, 128)),
    ],
)
def test_fp8_configs(name, config, shape, block):
    tensors, weight = eight_bit_layer(N, K, block=block, shape=shape, name=name)
    layer = packed_layer(fp8_format(config, tensors), tensors, N, K)
    assert torch.equal(layer.dequantize(), weight) and layer.quantized.activations == "fp8"
    assert layer.quantized.input_scale is None and layer.state_dict().keys() == tensors.keys()


@pytest.mark.parametrize("name", ["activation_scale", "input_scale", "qscale_act"])
def test_static_fp8_configs(name):
    tensors, _ = eight_bit_layer(N, K, block=(None, None), shape=(), name="weight_scale_inv")
    config = {"activation_scheme": "static"}
    with pytest.raises(InvalidArgument, match="^activation_scale is missing"):
        fp8_format(config, tensors)
    tensors[name] = torch.tensor(0.25)
    layer = packed_layer(fp8_format(config, tensors), tensors, N, K)
    assert layer.quantized.input_scale.tolist() == [0.25]
    assert layer.state_dict().keys() == tensors.keys()


def bad(what):
    tensors, _ = eight_bit_layer(N, K, block=(32, 64), name="weight_scale_inv")
    if what == "nan":
        tensors["weight_scale_inv"][1, 1] = float("nan")
    elif what == "nan weight":
        tensors["weight"][70, 3] = float("nan")
    elif what == "short":
        tensors["weight_scale_inv"] = tensors["weight_scale_inv"][:2]
    elif what == "type":
        tensors["weight"] = tensors["weight"].to(torch.float8_e5m2)
    elif what == "missing":
        del tensors["weight_scale_inv"]
    elif what == "zero point":
        tensors["weight_zero_point"] = torch.ones(3, 2, dtype=torch.int8)
    return tensors


@pytest.mark.parametrize(
    "what, message",
    [
        ("nan", "weight_scale_inv has values that are not finite"),
        ("nan weight", "weight has values that are not numbers"),
        ("short", r"weight_scale_inv has shape \[2, 2\], not \[3, 2\]"),
        ("type", "weight is torch.float8_e5m2, not torch.float8_e4m3fn"),
        ("missing", "weight_scale_inv is missing"),
        ("zero point", "weight_zero_point of fp8 weights must be 0"),
    ],
)
def test_bad_tensors(what, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        tensors = bad(what)
        packed_layer(fp8_format({"weight_block_size": [32, 64]}, tensors), tensors, N, K)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_bad_input_scale(value):
    tensors, _ = eight_bit_layer(N, K, name="weight_scale", block=(None, None), shape=())
    tensors["input_scale"] = torch.tensor(value)
    with pytest.raises(InvalidArgument, match="^input_scale (must be positive|has values that are not finite)"):
        packed_layer(fp8_format({"activation_scheme": "static"}, tensors), tensors, N, K)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"activation_scheme": "sometimes"}, "activation_scheme must be one of"),
        ({"weight_block_size": [128]}, "weight_block_size must be two positive numbers"),
        ({"weight_block_size": [0, 128]}, "weight_block_size must be two positive numbers"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        fp8_format(config, eight_bit_layer(N, K)[0])
