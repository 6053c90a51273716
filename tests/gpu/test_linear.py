"""Linear layers of few rows on Triton, against fp64 and against the separate operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_paged_kernels import fused
from hf_paged_kernels.norm import CASTS, Norm
from hf_paged_kernels.triton.linear import MAX_ROWS

NARROW = [torch.bfloat16, torch.float16]
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Layer:
    """Arguments of one call, and what it would be without rounding."""

    def __init__(
        self, device, rows, N, K, *, dtype=torch.bfloat16, bias=False, norm=None, activation=None, residual=False,
        magnitude=1.0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(rows + N + K)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        size = N if activation is None else 2 * N
        of_very_different_size = torch.logspace(-3, 2, rows)[:, None] if norm else 1.0
        self.x = (normal(rows, K) * of_very_different_size * magnitude).to(device, dtype)
        self.weight = (normal(size, K) / K**0.5).to(device, dtype)
        self.bias = normal(size).to(device, dtype) if bias else None
        self.options = {"activation": activation}
        self.options["norm"] = norm and norm._replace(weight=normal(K).to(device, dtype))
        self.options["residual"] = normal(rows, N).to(device, dtype) if residual else None

    def run(self, backend="triton"):
        return fused.linear(self.x, self.weight, self.bias, **self.options, backend=backend)

    def truth(self):
        x, weight = self.x.double(), self.weight.double()
        norm, activation, residual = (self.options[name] for name in ("norm", "activation", "residual"))
        if norm is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * (norm.offset + norm.weight.double())
        y = F.linear(x, weight, None if self.bias is None else self.bias.double())
        if activation is not None:
            gate, up = y.chunk(2, -1)
            y = ACTIVATIONS[activation](gate) * up
        return y if residual is None else residual.double() + y


def error(actual, truth):
    """Root mean square of a row's difference as a share of the row's size, [rows]."""
    return (actual.double() - truth).pow(2).mean(-1).sqrt() / truth.pow(2).mean(-1).sqrt()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 32])
def test_products_are_rounded_once(device, rows, dtype):
    for N, K in ((48, 96), (33, 1000), (130, 64), (16, 24)):
        layer = Layer(device, rows, N, K, dtype=dtype, bias=N == 33)
        actual, expected = layer.run(), layer.truth().to(dtype)
        assert actual.dtype == dtype and actual.is_contiguous()
        assert (actual != expected).float().mean() <= 0.02  # the sum in fp32 may fall on the other side of a half
        torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("options", [
    dict(norm=Norm(None, 1e-6)),
    dict(norm=Norm(None, 1e-5, 1.0, CASTS[1]), bias=True),
    dict(activation="silu"),
    dict(activation="gelu", bias=True),
    dict(activation="gelu_tanh", norm=Norm(None, 1e-6, 1.0, CASTS[1])),
    dict(residual=True),
    dict(residual=True, bias=True, norm=Norm(None, 1e-6)),
    dict(residual=True, bias=True, norm=Norm(None, 1e-6), activation="silu"),
], ids=lambda options: ", ".join(options))  # fmt: skip
@pytest.mark.parametrize("rows", [1, 7, 32])
def test_one_kernel_errs_no_more_than_the_separate_ones(device, rows, options):
    for N, K in ((64, 256), (33, 200)):
        layer = Layer(device, rows, N, K, **options)
        truth = layer.truth()
        own, separate = (error(layer.run(backend), truth) for backend in ("triton", "reference"))
        assert own.max() < 0.02
        scatter = 0.5 * rows**-0.5  # of two roundings of so many rows
        assert own.pow(2).mean().sqrt() <= (1 + scatter) * separate.pow(2).mean().sqrt() + 1e-5


def test_a_tiny_row_shows_the_epsilon(device):
    layer = Layer(device, 4, 32, 64, norm=Norm(None, 1e-6), magnitude=1e-3)
    wrong = Layer(device, 4, 32, 64, norm=Norm(None, 1e-5), magnitude=1e-3)
    assert error(layer.run(), layer.truth()).max() < 0.01 < error(wrong.run(), layer.truth())[0]


@pytest.mark.parametrize("options", [{}, dict(norm=Norm(None, 1e-6), activation="silu", bias=True)])
def test_a_row_has_the_same_bits_alone_and_in_company(device, options):
    layer = Layer(device, 32, 48, 160, **options)
    together = layer.run()
    x = layer.x
    for rows in (slice(0, 1), slice(3, 20), slice(31, 32)):
        layer.x = x[rows]
        assert torch.equal(layer.run(), together[rows])


def test_views_and_leading_dimensions(device):
    layer = Layer(device, 6, 32, 64, residual=True)
    expected = layer.run()
    padded = torch.cat((layer.x, layer.x), 1)
    merged = torch.cat((layer.weight, layer.weight), 1)
    layer.x, layer.weight = padded[:, :64].view(2, 3, -1), merged[:, 64:]
    layer.options["residual"] = layer.options["residual"].view(2, 3, -1)
    actual = layer.run()
    assert actual.shape == (2, 3, 32) and torch.equal(actual.view(6, 32), expected)
    layer.x = padded[:, :64].T.contiguous().T.view(2, 3, -1)
    assert torch.equal(layer.run(), actual)


@pytest.mark.parametrize("dtype, rows, norm", [
    (torch.float32, 3, None), (torch.bfloat16, MAX_ROWS + 1, None), (torch.float16, 3, Norm(None, 1e-6)),
    (torch.float32, 40, Norm(None, 1e-6, 1.0, CASTS[1])),
])  # fmt: skip
def test_what_has_no_kernel_of_its_own_takes_separate_ones(device, dtype, rows, norm):
    for activation in (None, "silu"):
        layer = Layer(device, rows, 24, 40, dtype=dtype, norm=norm, activation=activation, bias=True, residual=True)
        actual, expected = layer.run("triton"), layer.run("reference")
        assert error(actual, layer.truth()).max() <= 1.1 * error(expected, layer.truth()).max() + 1e-6


def test_residual_and_input_are_left_alone(device):
    layer = Layer(device, 3, 16, 32, residual=True, norm=Norm(None, 1e-6))
    x, residual = layer.x.clone(), layer.options["residual"].clone()
    for backend in ("triton", "reference"):
        layer.run(backend)
        assert torch.equal(layer.x, x) and torch.equal(layer.options["residual"], residual)


def test_no_rows(device):
    layer = Layer(device, 0, 16, 32, residual=True, activation="silu")
    assert layer.run().shape == (0, 16)


def test_refusals_name_the_argument(device):
    layer = Layer(device, 2, 16, 32)
    x, weight = layer.x, layer.weight
    with pytest.raises(ValueError, match=r"residual must be torch.bfloat16 \[2, 16\]"):
        fused.linear(x, weight, residual=x, backend="triton")
    with pytest.raises(ValueError, match="activation 'relu'"):
        fused.linear(x, weight, activation="relu", backend="triton")
    with pytest.raises(ValueError, match="weight must be"):
        fused.linear(x, weight, norm=Norm(weight[0, :31], 1e-6), backend="triton")
    with pytest.raises(ValueError, match="cast 'never'"):
        fused.linear(x, weight, norm=Norm(weight[0], 1e-6, 0.0, "never"), backend="triton")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|size mismatch"):
        fused.linear(x[:, :31], weight, backend="triton")
