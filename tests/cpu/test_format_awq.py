"""AWQ layers: the weights that hand-packed tensors stand for, the same tensors back, and what is refused."""

from __future__ import annotations

import pytest
from quantized_checkpoints import assert_layer, awq_layer, packed_layer

from hf_paged import InvalidArgument
from hf_paged.quant.formats.awq import AWQ
from hf_paged.quant.linear import QuantLinear


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(
    "version, group_size, K",
    [
        *(("gemm", group_size, 192) for group_size in (-1, 16, 64, 96)),
        *(("gemv", group_size, 768) for group_size in (-1, 32, 64, 128)),
        ("gemv", 32, 2048),  # more zero points than a row of words is filled up to
    ],
)
def test_every_kind(version, group_size, K, sym):
    tensors, weight = awq_layer(72, K, group_size=group_size, sym=sym, version=version)
    layer = assert_layer(AWQ(group_size, version), tensors, weight)
    assert (layer.quantized.zeros is None) == sym


def test_more_rows_than_are_packed_at_once():
    tensors, weight = awq_layer(4136, 512, group_size=64)
    assert_layer(AWQ(64), tensors, weight)


def test_impossible_formats():
    with pytest.raises(InvalidArgument, match="version must be one of .*not 'gemv_fast'"):
        AWQ(128, "gemv_fast")
    with pytest.raises(InvalidArgument, match="group_size must be positive or -1, not None"):
        AWQ(None)
    with pytest.raises(InvalidArgument, match="group_size 48 does not divide in_features 64"):
        QuantLinear(64, 64, False, AWQ(48))
    with pytest.raises(InvalidArgument, match="60 values of 4 bits do not fill int32 words"):
        QuantLinear(64, 60, False, AWQ(16))
    with pytest.raises(InvalidArgument, match="group_size 16 does not exist in version 'gemv'"):
        QuantLinear(64, 64, False, AWQ(16, "gemv"))


def test_bad_tensors():
    tensors, _ = awq_layer(64, 64)
    tensors["scales"][3, 4] = float("nan")
    with pytest.raises(InvalidArgument, match="^scales has values that are not finite"):
        packed_layer(AWQ(16), tensors, 64, 64)
    with pytest.raises(InvalidArgument, match=r"^qweight has shape \[64, 8\], not \[64, 16\]"):
        packed_layer(AWQ(-1, "gemv"), awq_layer(64, 64)[0], 64, 128)
