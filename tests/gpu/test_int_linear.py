"""Linear layers on weights of whole numbers on Triton, against fp64 and the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import quantized_weight

from hf_paged_kernels import fused
from hf_paged_kernels.triton.dequantize import dequantize

KINDS = ["int2", "int3", "int4", "int8"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [
    dict(group=128), dict(group=32, zeros=True), dict(group=20, zeros=True), dict(group=300, dtype=torch.float32),
    dict(group=64, perm=True, dtype=torch.bfloat16),
], ids=str)  # fmt: skip
def test_dequantized_weights_have_the_references_bits(device, kind, options):
    for shape, dtype in (((70, 300), torch.float32), ((2, 3, 165), torch.bfloat16)):
        weight = quantized_weight(kind, *shape, device=device, **options)
        expected = weight.with_tensors({"perm": None}).dequantize(dtype)
        assert torch.equal(dequantize(weight, dtype), expected)


@pytest.mark.parametrize("rows", [1, 3, 64, 400])
def test_int8_with_scales_of_blocks_or_of_all(device, rows):
    for N, K, group in ((200, 300, 128), (64, 77, 77), (65, 500, 200)):
        weight = quantized_weight("int8", N, K, group=group, rows=min(rows, N), zeros=rows == 3, device=device)
        assert torch.equal(dequantize(weight, torch.float32), weight.dequantize())


@pytest.mark.parametrize("dtype", FLOATS)
def test_many_rows(device, dtype):
    weight = quantized_weight("int4", 96, 256, group=64, zeros=True, perm=True, device=device)
    x, bias, residual = (torch.randn(*shape, device=device).to(dtype) for shape in ((2, 300, 256), (96,), (2, 300, 96)))
    actual = fused.linear(x, weight, bias, residual=residual, backend="triton")
    expected = residual + F.linear(x, weight.dequantize(dtype), bias)
    torch.testing.assert_close(actual, expected, rtol=3 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)
