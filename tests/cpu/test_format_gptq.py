"""GPTQ layers: the weights that hand-packed tensors stand for, the same tensors back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quantized_checkpoints import assert_layer, bit_stream, gptq_layer, packed_layer, same_bits

from hf_paged import InvalidArgument
from hf_paged.quant.formats.gptq import GPTQ
from hf_paged.quant.linear import QuantLinear


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [-1, 8, 32, 96])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_kind(bits, group_size, sym, act_order, version):
    N, K = 64, 192
    tensors, weight = gptq_layer(N, K, bits=bits, group_size=group_size, sym=sym, act_order=act_order, version=version)
    layer = assert_layer(GPTQ(bits, group_size, version), tensors, weight)
    assert (layer.quantized.zeros is None) == sym


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_that_gptqmodel_subtracted_from(bits):
    """It stores a word of zero points less 1 in each field as one number, so that a 0 borrows from the field above."""
    N, K = 64, 64
    tensors, weight = gptq_layer(N, K, bits=bits, group_size=32, version="gptq_v2")
    ones = sum(1 << bits * field for field in range(32 // bits))
    words = (tensors["qzeros"].long() - ones) % 2**32
    tensors["qzeros"] = (words - (words >> 31) * 2**32).to(torch.int32)
    layer = packed_layer(GPTQ(bits, 32, whole_words=True), tensors, N, K)
    assert torch.equal(layer.dequantize(), weight)
    assert same_bits(layer.state_dict()["qzeros"], tensors["qzeros"])
    with pytest.warns(UserWarning, match="zero points of 0"):
        assert not torch.equal(packed_layer(GPTQ(bits, 32), tensors, N, K).dequantize(), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_of_zero_as_auto_gptq_reads_them(bits):
    """A field of -1 has all bits set, and auto-gptq adds 1 to it as to every other: 2^bits. It comes back as it was."""
    tensors, _ = gptq_layer(64, 64, bits=bits, group_size=32)
    tensors["qzeros"][0] = -1
    with pytest.warns(UserWarning, match="zero points of 0"):
        layer = packed_layer(GPTQ(bits, 32), tensors, 64, 64)
    assert (layer.quantized.zeros[0] == (128 if bits == 8 else 1 << bits)).all()
    assert same_bits(layer.state_dict()["qzeros"], tensors["qzeros"])


def test_three_bits_as_gptqmodel_stores_them():
    """Fields cross words; it takes the 1 away from every field, and a zero point of 0 becomes 7."""
    N, K = 96, 64
    tensors, weight = gptq_layer(N, K, bits=3, group_size=32, version="gptq_v2")
    every = tensors["qzeros"].numpy().view("uint8")
    bits = np.unpackbits(every, axis=1, bitorder="little").reshape(len(every), N, 3)
    zeros = torch.from_numpy(bits @ np.array([1, 2, 4]))
    assert (zeros == 0).any()
    tensors["qzeros"] = bit_stream((zeros - 1) % 8, 3)
    layer = packed_layer(GPTQ(3, 32, whole_words=True), tensors, N, K)
    assert torch.equal(layer.dequantize(), weight)
    assert same_bits(layer.state_dict()["qzeros"], tensors["qzeros"])


def test_no_g_idx():
    tensors, weight = gptq_layer(64, 64)
    del tensors["g_idx"]
    layer = packed_layer(GPTQ(4, 16), tensors, 64, 64)
    assert torch.equal(layer.dequantize(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_keep_their_type(dtype):
    tensors, weight = gptq_layer(64, 64, dtype=dtype)
    layer = packed_layer(GPTQ(4, 16), tensors, 64, 64)
    assert torch.equal(layer.dequantize(), weight)
    assert layer.state_dict()["scales"].dtype == dtype


def test_state_dict_goes_from_layer_to_layer():
    first, second = (packed_layer(GPTQ(4, 16), gptq_layer(64, 64, act_order=True)[0], 64, 64) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.dequantize(), second.dequantize())
    with pytest.raises(RuntimeError, match=r"qweight has shape \[8, 32\]"):
        second.load_state_dict(first.state_dict() | {"qweight": torch.zeros(8, 32, dtype=torch.int32)})


def test_impossible_formats():
    with pytest.raises(InvalidArgument, match="bits must be one of .*not 5"):
        GPTQ(5, 128)
    with pytest.raises(InvalidArgument, match="group_size must be positive or -1, not 0"):
        GPTQ(4, 0)
    with pytest.raises(InvalidArgument, match="format must be one of .*not 'marlin'"):
        GPTQ(4, 128, "marlin")
    with pytest.raises(InvalidArgument, match="group_size 48 does not divide in_features 64"):
        QuantLinear(64, 64, False, GPTQ(4, 48))
    with pytest.raises(InvalidArgument, match="out_features of 60 do not fill int32 words"):
        QuantLinear(64, 60, False, GPTQ(4, 16))


def corrupted(name: str):
    tensors, _ = gptq_layer(64, 64, act_order=True)
    if name == "nan":
        tensors["scales"][1, 2] = float("nan")
    elif name == "infinite":
        tensors["scales"][3, 0] = float("inf")
    elif name == "unequal":
        tensors["g_idx"][tensors["g_idx"] == 3] = 2
    elif name == "beyond":
        tensors["g_idx"][5] = 4
    elif name == "negative":
        tensors["g_idx"][5] = -1
    elif name == "missing":
        del tensors["qzeros"]
    elif name == "short":
        tensors["qweight"] = tensors["qweight"][:-1]
    elif name == "type":
        tensors["qweight"] = tensors["qweight"].float()
    return tensors


@pytest.mark.parametrize(
    "name, message",
    [
        ("nan", "scales has values that are not finite"),
        ("infinite", "scales has values that are not finite"),
        ("unequal", "g_idx puts 0 to 32 features in a group"),
        ("beyond", "g_idx has groups 0 to 4 where there are 4"),
        ("negative", "g_idx has groups -1 to 3 where there are 4"),
        ("missing", "qzeros is missing"),
        ("short", r"qweight has shape \[7, 64\], not \[8, 64\]"),
        ("type", "qweight is torch.float32, not torch.int32"),
    ],
)
def test_bad_tensors(name, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        packed_layer(GPTQ(4, 16), corrupted(name), 64, 64)
