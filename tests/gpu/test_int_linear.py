"""Linear layers on weights of whole numbers on Triton, against fp64 and the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import quantized_weight

from hf_paged_kernels import fused
from hf_paged_kernels.norm import CASTS, Norm
from hf_paged_kernels.quantized import cat
from hf_paged_kernels.triton import int_linear
from hf_paged_kernels.triton.dequantize import dequantize
from hf_paged_kernels.triton.int_linear import FEW_ROWS, MAX_ROWS

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


class Layer:
    """Arguments of one call, and what it would be without rounding."""

    def __init__(
        self, device, rows, weight, *, dtype=torch.bfloat16, bias=False, norm=None, activation=None, residual=False
    ):
        generator = torch.Generator().manual_seed(rows)
        self.weight = weight
        N, K = weight.shape

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        self.x = normal(rows, K)
        self.bias = normal(N) if bias else None
        self.options = {"activation": activation, "norm": norm and norm._replace(weight=normal(K))}
        self.options["residual"] = normal(rows, N // 2 if activation else N) if residual else None

    def run(self, backend="triton"):
        return fused.linear(self.x, self.weight, self.bias, **self.options, backend=backend)

    def truth(self):
        norm, activation, residual = (self.options[name] for name in ("norm", "activation", "residual"))
        x = self.x.double()
        if norm is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * (norm.offset + norm.weight.double())
        y = F.linear(x, self.weight.dequantize().double(), None if self.bias is None else self.bias.double())
        if activation is not None:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        return y if residual is None else residual.double() + y


def error(actual, truth):
    """Root mean square of the difference as a share of the size."""
    return (actual.double() - truth).pow(2).mean().sqrt() / truth.pow(2).mean().sqrt()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind, group, zeros", [
    ("int4", 128, False), ("int4", 32, True), ("int4", 1300, True), ("int3", 128, True), ("int3", 16, False),
    ("int2", 64, True), ("int2", 512, False), ("int8", 1300, False), ("int8", 64, True), ("int4", 20, True),
])  # fmt: skip
def test_products_are_rounded_once(device, kind, group, zeros, dtype):
    """Whatever the kernel: of fp32, and of groups that end anywhere, it is torch's on the rounded weight."""
    weight = quantized_weight(kind, 70, 1300, group=group, zeros=zeros, device=device)
    layer = Layer(device, 3, weight, dtype=dtype, bias=group == 32)
    actual, expected = layer.run(), layer.truth()
    assert actual.dtype == dtype and actual.is_contiguous()
    if dtype == torch.float32 or group == 20:
        assert error(actual, expected) <= {torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    else:
        assert (actual != expected.to(dtype)).float().mean() <= 0.02  # the sum may fall on the other side of a half
        torch.testing.assert_close(actual, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("zeros", [False, True])
def test_instructions_for_pairs_have_the_bits_of_plain_operations(device, kind, dtype, zeros, monkeypatch):
    """All values of a kind with all their zero points; on a GPU as in the interpreter."""
    weight = quantized_weight(kind, 64, 330, group=32, zeros=zeros, device=device)
    layer = Layer(device, 2, weight, dtype=dtype)
    results = []
    for has_ptx in (False, True):
        monkeypatch.setattr(int_linear, "_has_ptx", lambda device, has_ptx=has_ptx: has_ptx)
        results.append(layer.run())
    assert torch.equal(*results)
    layer.x[:] = 0
    layer.x[:, torch.arange(2) * 300] = 1.0
    column = weight.dequantize().double()[:, [0, 300]].sum(1)
    torch.testing.assert_close(layer.run()[0], column.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind, K, perm, options", [
    ("int4", 1100, True, dict(norm=Norm(None, 1e-6))),
    ("int4", 300, False, dict(norm=Norm(None, 1e-5, 1.0, CASTS[1]), bias=True)),
    ("int8", 600, True, dict(norm=Norm(None, 1e-6), bias=True)),
    ("int3", 640, False, dict(activation="silu", bias=True)),
    ("int4", 300, True, dict(residual=True, bias=True, norm=Norm(None, 1e-6), activation="silu")),
    ("int8", 300, False, dict(residual=True, bias=True, norm=Norm(None, 1e-6, 1.0), activation="silu")),
    ("int2", 300, True, dict(residual=True)),
], ids=str)  # fmt: skip
def test_one_kernel_errs_no_more_than_the_separate_ones(device, kind, K, perm, options):
    weight = quantized_weight(kind, 140, K, group=32, zeros=True, perm=perm, device=device)
    for rows in (1, 18):
        layer = Layer(device, rows, weight, **options)
        assert int_linear.supports(layer.x, weight, layer.bias, layer.options["norm"], layer.options["activation"])
        truth = layer.truth()
        own, separate = (error(layer.run(backend), truth) for backend in ("triton", "reference"))
        assert own <= (1 + 0.5 * rows**-0.5) * separate


@pytest.mark.parametrize("kind, group, options", [
    ("int8", 64, {}), ("int4", 128, {}), ("int4", 32, dict(norm=Norm(None, 1e-6), activation="silu", bias=True)),
])  # fmt: skip
def test_a_row_has_the_same_bits_alone_and_in_company(device, kind, group, options):
    layer = Layer(device, FEW_ROWS, quantized_weight(kind, 100, 1100, group=group, device=device), **options)
    assert int_linear.tile(1, layer.weight, device).splits > 1
    together, x = layer.run(), layer.x
    for rows in (slice(0, 1), slice(3, 20), slice(31, 32)):
        layer.x = x[rows]
        assert torch.equal(layer.run(), together[rows])


@pytest.mark.parametrize("kind, rows", [("int4", 130), ("int8", 40)])
def test_more_rows(device, kind, rows):
    weight = quantized_weight(kind, 140, 600, group=64, zeros=True, perm=True, device=device)
    layer = Layer(device, rows, weight, bias=True, residual=True)
    assert error(layer.run(), layer.truth()) <= error(layer.run("reference"), layer.truth())
    activated = Layer(device, rows, weight, activation="silu", norm=Norm(None, 1e-6))
    assert error(activated.run(), activated.truth()) <= 1.1 * error(activated.run("reference"), activated.truth())


def test_programs_that_share_a_tile_leave_their_counters_at_zero(device):
    layer = Layer(device, 2, quantized_weight("int4", 300, 1100, device=device))
    first = layer.run()
    assert torch.equal(layer.run(), first)
    assert int_linear.counters(1, layer.x.device).count_nonzero() == 0


def test_views_leading_dimensions_and_no_rows(device):
    layer = Layer(device, 6, quantized_weight("int4", 140, 300, group=64, zeros=True, device=device), residual=True)
    expected = layer.run()
    layer.x, x = torch.cat((layer.x, layer.x), 1)[:, :300].view(2, 3, -1), layer.x
    layer.weight = cat([layer.weight, layer.weight]).narrow(140, 140)
    layer.options["residual"] = layer.options["residual"].view(2, 3, -1)
    assert torch.equal(layer.run(), expected.view(2, 3, -1))
    assert fused.linear(x[:0], layer.weight, backend="triton").shape == (0, 140)


@pytest.mark.parametrize("dtype", FLOATS)
def test_many_rows(device, dtype):
    rows = 2 * MAX_ROWS
    weight = quantized_weight("int4", 96, 256, group=64, zeros=True, perm=True, device=device)
    layer = Layer(device, rows, weight, dtype=dtype, bias=True, residual=True)
    layer.x, layer.options["residual"] = layer.x.view(2, MAX_ROWS, -1), layer.options["residual"].view(2, MAX_ROWS, -1)
    assert error(layer.run(), layer.truth()) <= 1.1 * error(layer.run("reference"), layer.truth())
