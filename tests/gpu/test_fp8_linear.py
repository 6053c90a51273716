"""Linear layers on fp8 weights, and on int8 weights with int8 inputs, on Triton: against fp64 and the reference."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import quantized_weight
from torch._subclasses import FakeTensorMode

from hf_paged_kernels import fused
from hf_paged_kernels.norm import CASTS, Norm
from hf_paged_kernels.quantized import DTYPES, QuantizedWeight
from hf_paged_kernels.ref.quantize import LIMITS
from hf_paged_kernels.ref.quantized import rounded_rows
from hf_paged_kernels.triton import eight_bits, fp8_many
from hf_paged_kernels.triton.launch import observing, tuning

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
KINDS = [("fp8", "fp8"), ("int8", "int8"), ("fp8", None)]
BLOCKS = ["row", "all", (64, 64), (128, 128), (16, 100), (1, 32)]
FEW, MANY = 32, 40  # rows that one kernel takes, and more


class Layer:
    """Arguments of one call, and what it would be without any rounding but that of the inputs to 8 bits."""

    def __init__(
        self, device, rows, N, K, kind="fp8", activations="fp8", *, block="row", dtype=torch.bfloat16, bias=False,
        norm=None, activation=None, residual=False, input_scale=None,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(rows + N + K)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        size = N if activation is None else 2 * N
        block_rows, columns = {"row": (1, K), "all": (size, K)}.get(block, block)
        self.weight = quantized_weight(
            kind, size, K, group=columns, rows=block_rows, activations=activations, input_scale=input_scale,
            device=device, dtype=torch.float32,
        )  # fmt: skip
        of_very_different_size = torch.logspace(-2, 2, rows)[:, None] if input_scale is None else 1.0
        self.x = (normal(rows, K) * of_very_different_size).to(device, dtype)
        self.bias = normal(size).to(device, dtype) if bias else None
        self.options = {"activation": activation}
        self.options["norm"] = norm and norm._replace(weight=normal(K).to(device, dtype))
        self.options["residual"] = normal(rows, N).to(device, dtype) if residual else None

    def run(self, backend="triton"):
        return fused.linear(self.x, self.weight, self.bias, **self.options, backend=backend)

    def truth(self):
        x, weight = self.x.float(), self.weight.dequantize().double()
        norm, activation, residual = (self.options[name] for name in ("norm", "activation", "residual"))
        if norm is not None:
            r = torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + norm.eps)
            x = (x.double() * r * (norm.offset + norm.weight.double())).float()
        x = rounded_rows(x, self.weight).double()
        y = F.linear(x, weight, None if self.bias is None else self.bias.double())
        if activation is not None:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        return y if residual is None else residual.double() + y


def error(actual, truth):
    """Root mean square of a row's difference as a share of the row's size, [rows]."""
    return (actual.double() - truth).pow(2).mean(-1).sqrt() / truth.pow(2).mean(-1).sqrt()


@pytest.mark.parametrize("kind, activations", KINDS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_products_of_rounded_inputs_are_rounded_once(device, block, kind, activations):
    """What is rounded to 8 bits is the reference's to the last value; then nothing is but the result."""
    bf16, fp16 = FLOATS[:2]
    for rows, N, K, dtype in ((1, 48, 96, bf16), (19, 130, 264, fp16), (MANY, 66, 264, bf16)):
        layer = Layer(device, rows, N, K, kind, activations, block=block, dtype=dtype, bias=N == 130)
        actual, expected = layer.run(), layer.truth().to(dtype)
        assert actual.dtype == dtype and actual.is_contiguous()
        if activations is None and rows > FEW:  # the weight is rounded, too
            assert error(actual, layer.truth()).max() <= 1.1 * error(layer.run("reference"), layer.truth()).max()
            continue
        close = dict(rtol=2 * torch.finfo(dtype).eps, atol=1e-4 * expected.abs().max().item())
        torch.testing.assert_close(actual, expected, **close)
        assert (actual != expected).float().mean() <= 0.02  # the sum in fp32 may fall on the other side of a half


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind, activations", KINDS)
def test_one_scale_for_all_inputs(device, kind, activations, dtype):
    """What is beyond it is cut off; also after a norm."""
    scale = 2.0 / LIMITS[DTYPES[kind]]
    for rows in (3, MANY):
        for norm in (None, Norm(None, 1e-6)):
            options = dict(input_scale=scale) if activations else {}
            layer = Layer(device, rows, 33, 96, kind, activations, dtype=dtype, norm=norm, bias=True, **options)
            whole = layer.truth()
            own, reference = (error(layer.run(backend), whole) for backend in ("triton", "reference"))
            assert own.max() <= 1.2 * reference.max() + 1e-6
            if activations:
                layer.weight = layer.weight.with_tensors({"input_scale": layer.weight.input_scale / 8})
                assert error(layer.run(), layer.truth()).max() < 0.05 < error(layer.run(), whole).min()


@pytest.mark.parametrize("options", [
    dict(norm=Norm(None, 1e-6)),
    dict(norm=Norm(None, 1e-5, 1.0, CASTS[1]), bias=True),
    dict(activation="silu", bias=True),
    dict(residual=True, bias=True, norm=Norm(None, 1e-6), activation="silu"),
], ids=lambda options: ", ".join(options))  # fmt: skip
@pytest.mark.parametrize("kind, activations", KINDS)
@pytest.mark.parametrize("rows", [1, 32, MANY])
def test_norm_activation_and_residual_err_no_more_than_separate_ones(device, rows, kind, activations, options):
    for N, K, block in ((64, 256, "row"), (33, 200, (64, 64))):
        layer = Layer(device, rows, N, K, kind, activations, block=block, **options)
        truth = layer.truth()
        own, separate = (error(layer.run(backend), truth) for backend in ("triton", "reference"))
        scatter = 0.5 * rows**-0.5  # of roundings that fall the other way, in so many rows
        assert own.pow(2).mean().sqrt() <= (1 + scatter) * separate.pow(2).mean().sqrt() + 1e-5


@pytest.mark.parametrize("kind, activations", KINDS)
@pytest.mark.parametrize("options", [
    {}, dict(norm=Norm(None, 1e-6), activation="silu", bias=True), dict(block=(64, 64), norm=Norm(None, 1e-6)),
], ids=str)  # fmt: skip
def test_a_row_has_the_same_bits_alone_and_in_company(device, kind, activations, options):
    for rows, parts in ((FEW, (slice(0, 1), slice(3, 20), slice(31, 32))), (2 * MANY, (slice(1, 2 * MANY),))):
        layer = Layer(device, rows, 48, 160, kind, activations, **options)
        together, x = layer.run(), layer.x
        for part in parts:
            layer.x = x[part]
            assert torch.equal(layer.run(), together[part])


@pytest.mark.parametrize("kind, activations", KINDS)
@pytest.mark.parametrize("options", [
    dict(bias=True, residual=True), dict(activation="silu", bias=True), dict(block=(64, 64), residual=True),
], ids=str)  # fmt: skip
def test_k_split_among_programs(device, kind, activations, options):
    """Sums of the parts are added in order: the same bits in any batch."""
    layer = Layer(device, 20, 48, 320, kind, activations, **options)
    whole = layer.run()
    with tuning("fp8_linear", splits=3, depth=32):
        split, x = layer.run(), layer.x
        torch.testing.assert_close(split, whole, rtol=2**-7, atol=2e-3 * whole.abs().max().item())
        layer.x, residual = x[4:5], layer.options["residual"]
        layer.options["residual"] = None if residual is None else residual[4:5]
        assert torch.equal(layer.run(), split[4:5])


def test_tiles_shorter_than_blocks(device):
    """The last block may end with any of them."""
    for rows, kernel in ((5, "fp8_linear"), (MANY, "fp8_many")):
        for K in (96, 160, 264):
            layer = Layer(device, rows, 24, K, block=(16, 64))
            with tuning(kernel, depth=32):
                torch.testing.assert_close(layer.run(), layer.truth().bfloat16(), rtol=2**-7, atol=1e-2)


def test_few_columns_and_many_inputs_are_split(device):
    layer = Layer(device, 2, 16, 16384)
    launched = []
    with observing(lambda kernel: launched.append(kernel.__name__) or nullcontext()):
        torch.testing.assert_close(layer.run(), layer.truth().bfloat16(), rtol=2**-7, atol=1e-3)
    assert launched == ["_few_rows_kernel", "_finish_kernel"]


@pytest.mark.parametrize("kind, activations", KINDS[:2])
def test_rows_of_zeros_and_rows_with_nan(device, kind, activations):
    for rows in (3, MANY):
        layer = Layer(device, rows, 32, 64, kind, activations)
        expected = layer.run()
        layer.x = layer.x.clone()
        layer.x[0], layer.x[1, 5], layer.x[2, 7] = 0, float("nan"), float("inf")
        actual = layer.run()
        assert (actual[0] == 0).all() and actual[1:3].isnan().all() and torch.equal(actual[3:], expected[3:])


@pytest.mark.parametrize("kind, activations", KINDS)
def test_views_and_leading_dimensions(device, kind, activations):
    layer = Layer(device, 6, 32, 64, kind, activations, residual=True)
    expected, weight = layer.run(), layer.weight
    merged = torch.cat((weight.data.view(torch.int8),) * 2, 1).view(weight.data.dtype)
    layer.weight = weight.with_tensors({"data": merged[:, 64:], "scales": torch.cat((weight.scales,) * 2, 1)[:, 32:]})
    padded = torch.cat((layer.x, layer.x), 1)
    layer.x = padded[:, :64].view(2, 3, -1)
    layer.options["residual"] = layer.options["residual"].view(2, 3, -1)
    actual = layer.run()
    assert actual.shape == (2, 3, 32) and torch.equal(actual.view(6, 32), expected)
    layer.x, layer.options["residual"] = layer.x[:0], layer.options["residual"][:0]
    assert layer.run().shape == (0, 3, 32)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_without_products_of_fp8_inputs_are_not_rounded_to_it(device, kind, monkeypatch):
    """As on GPUs before compute capability 8.9: bytes are decoded by hand, all of them right."""
    monkeypatch.setattr(eight_bits, "multiplies_fp8", lambda device: False)
    layer = Layer(device, 4, 32, 256, kind, kind)
    data = layer.weight.data.view(torch.int8)
    data[:] = torch.arange(256, device=device).to(torch.int8)
    rounded = layer.weight
    if kind == "fp8":
        data[2:] = data[2:].where(data[2:] & 127 != 127, 5)
        layer.weight = dataclasses.replace(rounded, activations=None)
    truth, layer.weight = layer.truth(), rounded
    assert truth[:, :2].isnan().all() == (kind == "fp8")
    for rows in (4, MANY):
        layer.x = layer.x[:1].expand(rows, -1).contiguous() if rows > 4 else layer.x
        own, expected = layer.run(), truth[:1].expand(rows, -1) if rows > 4 else truth
        first = 2 if kind == "fp8" else 0
        assert own[:, :first].isnan().all() and error(own[:, first:], expected[:, first:]).max() <= 4e-3


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("block", ["row", "all"])
def test_what_torch_multiplies_is_what_the_kernel_does(device, kind, block, monkeypatch):
    """Both ways of many rows; torch's products, which are meant for GPUs, take CPU tensors too."""
    for options in ({}, dict(bias=True, activation="silu"), dict(norm=Norm(None, 1e-6), residual=True)):
        layer = Layer(device, 64, 48, 96, kind, kind, block=block, **options)
        with monkeypatch.context() as patch:
            patch.setattr(fp8_many, f"_torch_multiplies_{kind}", lambda *_: False)
            own = layer.run()
            patch.setattr(fp8_many, f"_torch_multiplies_{kind}", lambda *_: True)
            by_torch = layer.run()
        if kind == "int8":  # sums are exact in any order, and what follows is the same
            assert torch.equal(by_torch, own)
        else:
            truth = layer.truth()
            assert error(by_torch, truth).mean() <= 1.5 * error(own, truth).mean() + 2e-3


def test_torch_takes_these_arguments_on_a_gpu():
    """torch's own checks of shapes, strides and types, on tensors that only pretend to be there."""
    for rows in ((1, 64), (48, 64)):
        with FakeTensorMode():
            data = torch.empty_strided((48, 64), (128, 1), dtype=torch.float8_e4m3fn, device="cuda")
            scales = torch.empty(1, 48 // rows[0], dtype=torch.bfloat16, device="cuda")
            weight = QuantizedWeight("fp8", 64, data, scales, block=rows, activations="fp8")
            values = torch.empty(40, 64, dtype=torch.float8_e4m3fn, device="cuda")
            scale, bias = torch.empty(40, 1, device="cuda"), torch.empty(48, dtype=torch.bfloat16, device="cuda")
            assert fp8_many.scaled_mm(values, scale, weight, bias, torch.bfloat16).shape == (40, 48)
