"""Linear layers of experts on weights of whole numbers on Triton, against fp64 and the reference."""

from __future__ import annotations

import pytest
import torch
from quantized_weights import quantized_weight

from hf_paged_kernels import fused
from hf_paged_kernels.triton import int_moe


class Layer:
    """A layer of experts, with `top_k` different ones for each of `tokens` rows."""

    def __init__(
        self, device, kind="int4", tokens=5, top_k=2, num_experts=4, K=300, N=140, dtype=torch.bfloat16, **weight
    ):
        generator = torch.Generator().manual_seed(tokens)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        self.weight = quantized_weight(kind, num_experts, N, K, device=device, **weight)
        self.x, self.bias, self.scale = normal(tokens, K), normal(num_experts, N), normal(tokens * top_k)
        order = torch.rand(tokens, num_experts, generator=generator).argsort(-1)
        self.experts = order[:, :top_k].reshape(-1).to(device)

    def run(self, backend="triton", **options):
        return fused.grouped_linear(self.x, self.weight, self.experts, backend=backend, **options)

    def expected(self, bias=None, activation=None, scale=None):
        """In fp64, rounded where the kernel stores less."""

        def rounded(y):
            return y.to(self.x.dtype).double()

        x = self.x.double().repeat_interleave(len(self.experts) // len(self.x), 0)
        y = torch.einsum("sk,snk->sn", x, self.weight.dequantize().double()[self.experts])
        y = rounded(y if bias is None else y + bias.double()[self.experts])
        if activation is not None:
            gate, up = y.chunk(2, -1)
            y = rounded(rounded(torch.nn.functional.silu(gate)) * up)
        return y if scale is None else rounded(y * scale.double()[:, None])


def check(layer, actual, **more):
    """Equal, but for sums that fall on the other side of a half, and what comes of them."""
    expected = layer.expected(**more).to(layer.x.dtype)
    torch.testing.assert_close(actual, expected, rtol=6 * torch.finfo(layer.x.dtype).eps, atol=1e-5)
    assert (actual != expected).float().mean() <= 0.03


@pytest.mark.parametrize("options", [
    dict(kind="int4", group=128), dict(kind="int4", group=32, zeros=True, perm=True, tokens=19, num_experts=2),
    dict(kind="int3", group=128, zeros=True, dtype=torch.float16), dict(kind="int2", group=64, tokens=1, top_k=3),
    dict(kind="int8", group=300, num_experts=20), dict(kind="int8", group=64, zeros=True, top_k=1, dtype=torch.float16),
], ids=str)  # fmt: skip
def test_against_fp64(device, options):
    layer = Layer(device, **options)
    for more in ({}, dict(bias=layer.bias, activation="silu", scale=layer.scale)):
        check(layer, layer.run(**more), **more)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_many_pairs(device, kind, monkeypatch):
    """Sorted by expert; one of the experts has none."""
    layer = Layer(device, kind, tokens=70, top_k=2, num_experts=3, group=64, zeros=True)
    layer.experts[:] = torch.tensor([2, 0], device=device).repeat(70)
    monkeypatch.setattr(int_moe, "MAX_PAIRS", 100)
    for more in (dict(scale=layer.scale), dict(bias=layer.bias, activation="silu")):
        check(layer, layer.run(**more), **more)


def test_more_rows_of_an_expert_than_promised_are_not_left_out_silently(device):
    layer = Layer(device, tokens=40, top_k=1, num_experts=2, K=64, N=32)
    layer.experts[:] = 0
    layer.experts[7] = 1
    torch.testing.assert_close(layer.run(max_rows=39), layer.run(max_rows=40), rtol=0, atol=0)
    broken = layer.run(max_rows=20)
    assert broken[0].isnan().all() and not broken[7].isnan().any()


def test_a_row_has_the_same_bits_alone_and_in_company(device):
    layer = Layer(device, tokens=24, num_experts=8, group=32)
    together, x, experts = layer.run(), layer.x, layer.experts
    for rows in (slice(0, 1), slice(5, 9)):
        layer.x, layer.experts = x[rows], experts.view(24, 2)[rows].reshape(-1)
        assert torch.equal(layer.run(), together.view(24, 2, -1)[rows].flatten(0, 1))


def test_a_router_in_fp32_and_experts_in_fp32(device):
    layer = Layer(device, group=64)
    weighted = layer.run(scale=layer.scale.float())
    assert weighted.dtype == torch.float32 and torch.equal(weighted, layer.run() * layer.scale.float()[:, None])
    layer.x = layer.x.float()
    torch.testing.assert_close(layer.run(), layer.expected().float(), rtol=1e-5, atol=1e-5)
