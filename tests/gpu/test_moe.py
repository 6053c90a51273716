"""Linear layers of experts on Triton, against fp64 and the reference."""

from __future__ import annotations

import pytest
import torch

from hf_paged_kernels import fused
from hf_paged_kernels.triton.moe import MAX_PAIRS

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


class Layer:
    """A layer of `num_experts`, `tokens` rows and `top_k` different experts for each."""

    def __init__(self, device, tokens=5, top_k=2, num_experts=4, H=48, size=40, dtype=torch.bfloat16, router=None):
        generator = torch.Generator().manual_seed(tokens * num_experts)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        self.x = (normal(tokens, H) * torch.logspace(-1, 1, tokens)[:, None]).to(device, dtype)
        self.gate_up = (normal(num_experts, 2 * size, H) / H**0.5).to(device, dtype)
        self.down = (normal(num_experts, H, size) / size**0.5).to(device, dtype)
        order = torch.rand(tokens, num_experts, generator=generator).argsort(-1)
        self.experts = order[:, :top_k].to(device)
        self.router = normal(tokens, top_k).softmax(-1).to(device, router or dtype)

    def run(self, backend="triton", activation="silu"):
        return fused.moe_experts(
            self.x, self.gate_up, self.down, self.experts, self.router, activation=activation, backend=backend
        )

    def in_fp64(self):
        wide = Layer.__new__(Layer)
        wide.__dict__.update({name: t if name == "experts" else t.double() for name, t in vars(self).items()})
        return wide


def error(actual, truth):
    return (actual.double() - truth).pow(2).mean(-1).sqrt() / truth.pow(2).mean(-1).sqrt()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", [
    dict(tokens=1, top_k=2), dict(tokens=5, top_k=3), dict(tokens=19, top_k=1, num_experts=2),
    dict(tokens=37, top_k=2, num_experts=3, H=33, size=17), dict(tokens=3, top_k=8, num_experts=60, H=64, size=32),
], ids=str)  # fmt: skip
def test_against_fp64(device, sizes, dtype):
    layer = Layer(device, **sizes, dtype=dtype)
    truth = layer.in_fp64().run("reference")
    own, reference = error(layer.run(), truth), error(layer.run("reference"), truth)
    assert layer.run().dtype == dtype
    limit = {torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 0.002}[dtype]
    assert own.max() <= limit and own.mean() <= 1.2 * reference.mean() + 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_of_the_router_in_fp32(device, dtype):
    layer = Layer(device, dtype=dtype, router=torch.float32)
    pairs, hidden = layer.experts.reshape(-1), torch.randn(10, 40, device=device).to(dtype)
    weighted = fused.grouped_linear(hidden, layer.down, pairs, scale=layer.router.reshape(-1), backend="triton")
    plain = fused.grouped_linear(hidden, layer.down, pairs, backend="triton")
    assert weighted.dtype == torch.float32 and torch.equal(weighted, plain * layer.router.reshape(-1, 1))
    assert layer.run().dtype == dtype


@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("transposed", [False, True])
def test_biases_and_transposed_weights(device, transposed, activation):
    layer = Layer(device, tokens=7, top_k=2, dtype=torch.float32)
    bias = torch.randn(4, 80, device=device)
    weight = layer.gate_up.mT.contiguous().mT if transposed else layer.gate_up
    options = dict(activation=activation)
    actual, expected = (
        fused.grouped_linear(layer.x, w, layer.experts.reshape(-1), bias, **options, backend=backend)
        for w, backend in ((weight, "triton"), (layer.gate_up, "reference"))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_many_rows_of_one_expert(device):
    """Up to what was promised all are computed; beyond, nothing is left out silently."""
    x, weight = (torch.randn(*shape, device=device) for shape in ((40, 24), (2, 16, 24)))
    experts = torch.zeros(40, dtype=torch.int64, device=device)
    experts[7] = 1
    expected = fused.grouped_linear(x, weight, experts, backend="reference")
    for max_rows in (None, 39):
        actual = fused.grouped_linear(x, weight, experts, max_rows=max_rows, backend="triton")
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    broken = fused.grouped_linear(x, weight, experts, max_rows=20, backend="triton")
    assert broken[0].isnan().all() and not broken[7].isnan().any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_has_the_same_bits_alone_and_in_company(device, dtype):
    layer = Layer(device, tokens=24, top_k=2, num_experts=8, dtype=dtype)
    together = layer.run()
    x, experts, router = layer.x, layer.experts, layer.router
    for rows in (slice(0, 1), slice(5, 9)):
        layer.x, layer.experts, layer.router = x[rows], experts[rows], router[rows]
        assert torch.equal(layer.run(), together[rows])


@pytest.mark.parametrize("num_experts", [4, 60])  # programs for experts, and for pairs
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_experts_of_which_some_are_elsewhere(device, num_experts, backend):
    """Two halves of the experts add up to all of them, with biases; a token may have no expert here at all."""
    layer = Layer(device, tokens=6, top_k=3, num_experts=num_experts, dtype=torch.float32)
    layer.experts[2], layer.experts[4] = torch.arange(3), torch.arange(num_experts - 3, num_experts)
    bias, half = torch.randn(num_experts, 48, device=device), num_experts // 2
    options = dict(activation="silu", after=lambda rows: rows + 1)
    whole = fused.moe_experts(
        layer.x, layer.gate_up, layer.down, layer.experts, layer.router, down_bias=bias, backend="reference", **options
    )
    parts = []
    for first in (0, half):
        mine = (layer.experts >= first) & (layer.experts < first + half)
        here = slice(first, first + half)
        parts.append(fused.moe_experts(
            layer.x, layer.gate_up[here], layer.down[here], torch.where(mine, layer.experts - first, half), layer.router * mine,
            down_bias=bias[here], partial=True, backend=backend, **options,
        ))  # fmt: skip
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


def test_more_pairs_than_the_kernel_is_for(device):
    layer = Layer(device, tokens=MAX_PAIRS // 2 + 1, top_k=2, H=16, size=16)
    assert torch.equal(layer.run("triton"), layer.run("reference"))


def test_refusals_name_the_argument(device):
    layer = Layer(device)
    with pytest.raises(ValueError, match="experts .* multiple of the rows of x"):
        fused.grouped_linear(layer.x, layer.gate_up, layer.experts.reshape(-1)[:9], backend="triton")
    with pytest.raises(ValueError, match="scale has shape"):
        fused.grouped_linear(layer.x, layer.gate_up, layer.experts.reshape(-1), scale=layer.router, backend="triton")
    with pytest.raises(ValueError, match="activation 'relu'"):
        layer.run(activation="relu")
