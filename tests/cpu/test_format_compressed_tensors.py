"""compressed-tensors: packed layers, which group of the config a layer belongs to, and what is refused."""

from __future__ import annotations

import pytest
import torch
from quantized_checkpoints import assert_layer, eight_bit_layer, packed_layer, packed_layer_of_ct

from hf_paged import InvalidArgument
from hf_paged.quant.formats.compressed_tensors import PackQuantized, layer_format
from hf_paged.quant.formats.eight_bit import EightBit
from hf_paged.quant.linear import QuantLinear

LINEAR = ["Linear", "Module", "object"]
NAME = "model.layers.3.mlp.down_proj"
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
INT8 = FP8 | {"type": "int"}
BY_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [-1, 8, 32, 96])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_kind(bits, group_size, sym, act_order):
    tensors, weight = packed_layer_of_ct(76, 192, bits=bits, group_size=group_size, sym=sym, act_order=act_order)
    if act_order and group_size == -1:
        del tensors["weight_g_idx"]  # of one group it says nothing, and is not written again
    layer = assert_layer(PackQuantized(bits, group_size, sym), tensors, weight)
    assert (layer.quantized.zeros is None) == sym


def test_rows_that_do_not_fill_words():
    tensors, weight = packed_layer_of_ct(70, 84, group_size=12, sym=False)
    assert tensors["weight_packed"].shape == (70, 11) and tensors["weight_zero_point"].shape == (9, 7)
    assert_layer(PackQuantized(4, 12, False), tensors, weight)


def test_g_idx_of_no_order():
    tensors, weight = packed_layer_of_ct(64, 64)
    layer = packed_layer(PackQuantized(4, 16), tensors | {"weight_g_idx": torch.full((64,), -1)}, 64, 64)
    assert torch.equal(layer.dequantize(), weight) and layer.quantized.perm is None


def config(*groups, **settings):
    return {"config_groups": {f"group_{index}": group for index, group in enumerate(groups)}} | settings


def group(targets, weights, inputs=None, **settings):
    return {"targets": targets, "weights": weights, "input_activations": inputs} | settings


PACKED = packed_layer_of_ct(32, 64)[0]
CHANNELS = eight_bit_layer(32, 64)[0]


def test_groups_by_name_pattern_and_class():
    groups = config(
        group(["Linear"], INT4),
        group([r"re:.*\.mlp\..*"], INT4 | {"group_size": 32}),
        group(["model.layers.3.mlp.down_proj"], INT4 | {"group_size": 64}),
    )
    sizes = {
        "model.layers.3.mlp.down_proj": 64,
        "model.layers.4.mlp.down_proj": 32,
        "model.layers.3.self_attn.q_proj": 16,
    }
    for name, size in sizes.items():
        assert layer_format(groups, name, LINEAR, PACKED) == PackQuantized(4, size)
    with pytest.raises(InvalidArgument, match="config_groups has no group for a layer"):
        layer_format(groups, "model.layers.3.self_attn.q_proj", ["Conv1D", "Module", "object"], PACKED)


@pytest.mark.parametrize(
    "weights, inputs, shape, expected",
    [
        (FP8, BY_TOKEN, (32, 1), EightBit("fp8", activations="fp8")),
        (FP8, None, (32, 1), EightBit("fp8")),
        (FP8 | {"strategy": "tensor"}, BY_TOKEN, (1,), EightBit("fp8", (None, None), scale_dims=1, activations="fp8")),
        (FP8 | {"strategy": "block", "block_structure": [16, 32]}, None, (2, 2), EightBit("fp8", (16, 32))),
        (INT8, BY_TOKEN | {"type": "int"}, (32, 1), EightBit("int8", activations="int8")),
        (INT8 | {"strategy": "group", "group_size": 32}, None, (32, 2), EightBit("int8", (1, 32))),
    ],
)
def test_eight_bit_schemes(weights, inputs, shape, expected):
    tensors = {"weight": CHANNELS["weight"], "weight_scale": torch.rand(shape)}
    assert layer_format(config(group(["Linear"], weights, inputs)), NAME, LINEAR, tensors) == expected


def test_static_inputs():
    inputs = BY_TOKEN | {"dynamic": False, "strategy": "tensor"}
    groups = config(group(["Linear"], FP8, inputs))
    with pytest.raises(InvalidArgument, match="^input_scale is missing"):
        layer_format(groups, NAME, LINEAR, CHANNELS)
    tensors = CHANNELS | {"input_scale": torch.tensor([0.5], dtype=torch.bfloat16)}
    layer = packed_layer(layer_format(groups, NAME, LINEAR, tensors), tensors, 32, 64)
    assert layer.quantized.input_scale.tolist() == [0.5] and layer.quantized.activations == "fp8"
    assert layer.state_dict()["input_scale"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "settings, tensors, message",
    [
        (config(group(["Linear"], INT4 | {"num_bits": 5})), PACKED, "num_bits must be one of"),
        (config(group(["Linear"], INT4 | {"type": "float"})), PACKED, "type float is not supported for packed weights"),
        (config(group(["Linear"], INT4, BY_TOKEN)), PACKED, "input_activations are not supported for packed"),
        (config(group(["Linear"], INT4, output_activations=BY_TOKEN)), PACKED, "output_activations are not supported"),
        (config(group(["Linear"], INT4), sparsity_config={"format": "sparse-24-bitmask"}), PACKED, "sparsity_config"),
        (config(group(["Linear"], INT4), transform_config={"config_groups": {"u": {}}}), PACKED, "transform_config"),
        (config(group(["Linear"], FP8 | {"num_bits": 4})), CHANNELS, "num_bits must be 8, not 4"),
        (config(group(["Linear"], FP8 | {"strategy": "block"})), CHANNELS, "strategy 'block' with"),
        (config(group(["Linear"], FP8 | {"strategy": "tensor_group"})), CHANNELS, "strategy 'tensor_group' with"),
        (
            config(group(["Linear"], FP8, BY_TOKEN | {"symmetric": False})),
            CHANNELS,
            "input_activations must be symmetric",
        ),
        (
            config(group(["Linear"], FP8, BY_TOKEN | {"type": "int"})),
            CHANNELS,
            "input_activations of 8 bits of type 'int'",
        ),
        (config(group(["Linear"], FP8, BY_TOKEN | {"num_bits": 4})), CHANNELS, "input_activations of 4 bits"),
        (
            config(group(["Linear"], FP8, BY_TOKEN | {"dynamic": "local"})),
            CHANNELS,
            "input_activations: dynamic 'local'",
        ),
        (
            config(group(["Linear"], FP8, BY_TOKEN | {"dynamic": False})),
            CHANNELS,
            "input_activations: static ones with",
        ),
        (config(group(["Linear"], FP8)), {"weight": CHANNELS["weight"]}, "weight_scale is missing"),
        ({}, CHANNELS, "config_groups has no group"),
    ],
)
def test_what_is_refused(settings, tensors, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        layer_format(settings, NAME, LINEAR, tensors)


def test_bad_tensors():
    good, format = packed_layer_of_ct(64, 64, act_order=True)[0], PackQuantized(4, 16)
    for change, message in (
        ({"weight_shape": torch.tensor([64, 65])}, r"weight_shape is \[64, 65\], not \[64, 64\]"),
        ({"weight_packed": good["weight_packed"][:, :7]}, r"weight_packed has shape \[64, 7\], not \[64, 8\]"),
        ({"weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "weight_g_idx puts 0 to 64 features in a group"),
        ({"weight_scale": good["weight_scale"] * float("inf")}, "weight_scale has values that are not finite"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{message}"):
            packed_layer(format, good | change, 64, 64)
    with pytest.raises(InvalidArgument, match="^weight_zero_point is missing"):
        packed_layer(PackQuantized(4, 16, False), good, 64, 64)
    with pytest.raises(InvalidArgument, match="group_size 48 does not divide in_features 64"):
        QuantLinear(64, 64, False, PackQuantized(4, 48))
