"""Experts on fp8 weights, and on int8 weights with int8 inputs, on Triton: against fp64 of the rounded inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import quantized_weight

from hf_paged_kernels import fused
from hf_paged_kernels.ref.quantized import rounded_rows
from hf_paged_kernels.triton.moe import MAX_PAIRS, MAX_ROWS

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
KINDS = [("fp8", "fp8"), ("int8", "int8"), ("fp8", None)]
FEW = dict(tokens=5, top_k=3, num_experts=4)
MANY = dict(tokens=35, top_k=2, num_experts=2)  # more pairs than the kernel that finds its rows is for
SPARSE = dict(tokens=2, top_k=2, num_experts=20)


class Experts:
    def __init__(self, device, kind="fp8", activations="fp8", *, tokens, top_k, num_experts, N=40, K=96, block=None,
                 dtype=torch.bfloat16, input_scale=None):  # fmt: skip
        generator = torch.Generator().manual_seed(tokens * num_experts)
        rows, columns = block or (1, K)
        self.weight = quantized_weight(
            kind, num_experts, N, K, group=columns, rows=rows, activations=activations, input_scale=input_scale,
            device=device, dtype=torch.float32,
        )  # fmt: skip
        sizes = torch.logspace(-1, 1, tokens)[:, None] if input_scale is None else 1.0
        self.x = (torch.randn(tokens, K, generator=generator) * sizes).to(device, dtype)
        self.bias = torch.randn(num_experts, N, generator=generator).to(device, dtype)
        order = torch.rand(tokens, num_experts, generator=generator).argsort(-1)
        self.experts = order[:, :top_k].to(device).reshape(-1)
        self.scale = torch.rand(len(self.experts), generator=generator).to(device)

    def run(self, bias=True, **options):
        options = dict(activation=None, scale=None) | options
        return fused.grouped_linear(
            self.x, self.weight, self.experts, self.bias if bias else None, **options, backend="triton"
        )

    def truth(self, bias=True, activation=None, scale=None):
        x = rounded_rows(self.x.float(), self.weight).double().repeat_interleave(len(self.experts) // len(self.x), 0)
        weight = self.weight.dequantize().double()[self.experts]
        y = torch.einsum("sk,snk->sn", x, weight) + (self.bias.double()[self.experts] if bias else 0)
        if activation:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        return y if scale is None else y * scale.double()[:, None]


def error(actual, truth):
    return (actual.double() - truth).pow(2).mean(-1).sqrt() / truth.pow(2).mean(-1).sqrt()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind, activations", KINDS)
@pytest.mark.parametrize("sizes", [FEW, MANY, SPARSE], ids=["few", "many", "sparse"])
def test_against_fp64(device, sizes, kind, activations, dtype):
    assert len(Experts(device, **MANY).experts) > MAX_ROWS * MANY["num_experts"]
    for block in ((None, (16, 64)) if dtype != torch.float16 else ((40, 96), (64, 20))):
        layer = Experts(device, kind, activations, **sizes, block=block, dtype=dtype)
        limit = {torch.float32: 5e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
        assert error(layer.run(), layer.truth()).max() <= limit
        gated = error(layer.run(activation="silu"), layer.truth(activation="silu"))
        assert gated.max() <= 10 * limit and gated.mean() <= 3 * limit


@pytest.mark.parametrize("kind, activations", KINDS)
@pytest.mark.parametrize("sizes", [FEW, MANY], ids=["few", "many"])
def test_weights_of_the_router_in_fp32(device, sizes, kind, activations):
    layer = Experts(device, kind, activations, **sizes)
    weighted = layer.run(scale=layer.scale)
    assert weighted.dtype == torch.float32 and torch.equal(weighted, layer.run() * layer.scale[:, None])


@pytest.mark.parametrize("kind, activations", KINDS[:2])
def test_one_scale_for_all_inputs(device, kind, activations):
    for sizes in (FEW, MANY):
        layer = Experts(device, kind, activations, **sizes, input_scale=0.5 / (448 if kind == "fp8" else 127))
        assert error(layer.run(), layer.truth()).max() <= 3e-3


@pytest.mark.parametrize("kind, activations", KINDS)
def test_a_row_has_the_same_bits_alone_and_in_company(device, kind, activations):
    layer = Experts(device, kind, activations, tokens=24, top_k=2, num_experts=8, block=(16, 64))
    together, x, experts = layer.run(), layer.x, layer.experts
    for rows in (slice(0, 1), slice(5, 9)):
        layer.x, layer.experts = x[rows], experts[2 * rows.start : 2 * rows.stop]
        assert torch.equal(layer.run(), together[2 * rows.start : 2 * rows.stop])


def test_many_rows_of_one_expert(device):
    """Up to what was promised all are computed; beyond, nothing is left out silently. Other experts may have none."""
    layer = Experts(device, tokens=40, top_k=1, num_experts=3)
    layer.experts = torch.ones_like(layer.experts)
    layer.experts[7] = 2
    for max_rows in (None, 39):
        assert error(layer.run(max_rows=max_rows), layer.truth()).max() <= 3e-3
    broken = layer.run(max_rows=20)
    assert broken[0].isnan().all() and not broken[7].isnan().any()
    layer = Experts(device, tokens=MAX_PAIRS + 1, top_k=1, num_experts=20, N=16, K=32)
    layer.experts = 3 + layer.experts % 2
    assert error(layer.run(), layer.truth()).max() <= 4e-3


def test_gate_up_and_down(device):
    """`moe_experts` as a model calls it: no further from the truth than the reference."""
    sizes = dict(tokens=7, top_k=2, num_experts=4)
    up, down = Experts(device, **sizes, N=96, K=64), Experts(device, **sizes, N=64, K=48)
    chosen = up.experts.view(7, 2)
    call = (up.x, up.weight, down.weight, chosen, torch.rand(7, 2, device=device).bfloat16())
    own, reference = (fused.moe_experts(*call, activation="silu", backend=b) for b in ("triton", "reference"))
    assert error(own, reference.double()).max() < 0.05
