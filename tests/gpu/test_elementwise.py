"""Norms, gated activations and rotary embedding on Triton, against the references and transformers' own modules."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_paged_kernels import fused
from hf_paged_kernels.norm import CASTS, Norm
from hf_paged_kernels.quantized import DTYPES
from hf_paged_kernels.ref.quantize import quantize as reference_quantize

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# One unit in the last place, relative. In another order a sum may move a rounding by one, and so may an exponential.
STEP = {torch.float32: 2.4e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Share of values of a narrow type that may be another unit. In fp16 a rounding is eight times as likely to be close.
OTHER = {torch.bfloat16: 1e-3, torch.float16: 4e-3}
SIZES = [1, 7, 33, 64, 576, 1000, 2048]
MAGNITUDES = torch.tensor([1e-4, 1e-2, 1.0, 1.0, 10.0, 100.0])


def randn(*shape, dtype, device, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def rows(size, dtype, device, seed=0):
    """Six rows of very different magnitude."""
    x = torch.randn(6, size, generator=torch.Generator().manual_seed(seed)) * MAGNITUDES[:, None]
    return x.to(device, dtype)


def assert_same(actual, expected, units=2, atol=0.0, share=1.0):
    """Within a few units in the last place; narrow types have the same bits but for a small share."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=units * STEP[expected.dtype], atol=atol)
    if expected.dtype != torch.float32 and expected.numel() > 1000:
        assert (actual != expected).float().mean() <= share * OTHER[expected.dtype]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(device, offset, cast, dtype):
    for size in SIZES:
        x, weight = rows(size, dtype, device), randn(size, dtype=dtype, device=device, seed=1)
        for w in (weight, None):
            options = dict(offset=offset, cast=cast)
            actual, expected = (fused.rms_norm(x, w, 1e-6, **options, backend=b) for b in ("triton", "reference"))
            assert_same(actual, expected, atol=1e-7 if dtype == torch.float16 else 0.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "module, options",
    [(LlamaRMSNorm, {"cast": "weight_after"}), (Gemma2RMSNorm, {"cast": "weight_before", "offset": 1.0})],
)
def test_rms_norm_is_that_of_the_modules(device, module, options, dtype):
    norm = module(576, eps=1e-5).to(device, dtype)
    norm.weight.data = randn(576, dtype=dtype, device=device, seed=1)
    x = rows(576, dtype, device, seed=2)
    assert_same(fused.rms_norm(x, norm.weight.data, 1e-5, **options, backend="triton"), norm(x).detach())


def test_norms_of_heads_read_views_of_a_merged_projection(device):
    merged = randn(5, 8 * 48 + 3, dtype=torch.bfloat16, device=device) * 3
    weight = randn(48, dtype=torch.bfloat16, device=device, seed=1)
    heads = merged[:, 96 : 96 + 4 * 48].view(5, 4, 48)
    for view in (heads, heads.transpose(0, 1), merged[:, 3:51], heads[None], heads[:, 0], heads[0, 0]):
        actual, expected = (fused.rms_norm(view, weight, 1e-6, backend=b) for b in ("triton", "reference"))
        assert_same(actual, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_sum_is_rounded_before_it_is_normed(device, dtype):
    for size in (33, 576):
        x, residual = rows(size, dtype, device), rows(size, dtype, device, seed=1).flip(0)
        merged = torch.cat((x, residual), 1)
        norm = Norm(randn(size, dtype=dtype, device=device, seed=2), 1e-6)
        actual, expected = (fused.add_rms_norm(x, residual, norm, backend=b) for b in ("triton", "reference"))
        assert torch.equal(actual[1], expected[1]) and torch.equal(actual[1], residual + x)
        assert_same(actual[0], expected[0])
        views = fused.add_rms_norm(merged[:, :size], merged[:, size:], norm, backend="triton")
        assert all(map(torch.equal, views, actual))


@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm(device, dtype):
    for size in SIZES[1:]:  # a row of one is 0 here, and some rounding error in torch
        x = rows(size, dtype, device) + MAGNITUDES[:, None].to(device, dtype)  # the mean is of a row's own size
        weight, bias = (randn(size, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
        for w, b in ((weight, bias), (weight, None), (None, None)):
            actual, expected = (fused.layer_norm(x, w, b, 1e-5, backend=k) for k in ("triton", "reference"))
            # Where bias and product cancel, what is left of fp32 sums in different orders is compared with their size.
            assert_same(actual, expected, atol=4e-6 if dtype == torch.float32 else 1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_act_and_mul(device, activation, dtype):
    for size in (*SIZES, 5000):
        gate_up = randn(4, 2 * size + 5, dtype=dtype, device=device)[:, 3 : 3 + 2 * size] * 4
        actual, expected = (fused.act_and_mul(gate_up, activation, backend=b) for b in ("triton", "reference"))
        # Both gelu lose digits where 1 + erf(x) or 1 + tanh(x) cancels, in torch as here, but not the same digits.
        atol, share = 1e-5 if dtype == torch.float32 else 2e-6, 1 if activation == "silu" else 10
        assert_same(actual, expected, units=4, atol=atol, share=share)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_at_the_ends(device, activation):
    gate = torch.tensor([-1e30, -200.0, -90.0, -20.0, -1.0, -0.0, 0.0, 1.0, 20.0, 200.0, 1e30], device=device)
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
    actual, expected = (fused.act_and_mul(gate_up, activation, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    nan = torch.tensor([[float("nan"), 1.0]], device=device)
    assert fused.act_and_mul(nan, activation, backend="triton").isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads, D, R", [((5, 2), 64, 64), ((9, 1), 80, 32), ((2, 2), 10, 6), ((3, 3), 96, 96)])
def test_rotary_has_the_bits_of_torch(device, heads, D, R, dtype):
    T, (q_heads, k_heads) = 4, heads
    merged = randn(T, (q_heads + 2 * k_heads) * D, dtype=dtype, device=device)
    q = merged[:, : q_heads * D].view(T, q_heads, D)
    k = merged[:, q_heads * D : (q_heads + k_heads) * D].view(T, k_heads, D)
    cos, sin = (randn(T, R, dtype=dtype, device=device, seed=seed) for seed in (1, 2))  # halves that differ
    for q_view in (q, q.transpose(0, 1).contiguous().transpose(0, 1)):
        actual, expected = (fused.rotary(q_view, k, cos, sin, backend=b) for b in ("triton", "reference"))
        for a, e in zip(actual, expected):
            assert a.is_contiguous() and torch.equal(a, e)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quantize", ["fp8", "int8"])
def test_8_bits_of_every_row_by_its_own_scale(device, quantize, dtype):
    """The bits of quantizing the kernel's own unquantized result; a row of zeros stays one, and one with a NaN is NaN."""
    x = rows(576, dtype, device)
    x[2] = 0
    x[4, 7] = float("nan")
    residual, weight, bias = (randn(*shape, dtype=dtype, device=device) for shape in ((6, 576), (576,), (576,)))
    calls = [
        lambda **q: fused.rms_norm(x, weight, 1e-6, backend="triton", **q),
        lambda **q: fused.add_rms_norm(x, residual, Norm(weight, 1e-6), backend="triton", **q)[0],
        lambda **q: fused.layer_norm(x, weight, bias, 1e-6, backend="triton", **q),
        lambda **q: fused.act_and_mul(x.clamp(-50, 50), "silu", backend="triton", **q),
    ]  # fmt: skip
    for call in calls:
        plain, (q, scale) = call(), call(quantize=quantize)
        expected, expected_scale = reference_quantize(plain, DTYPES[quantize])
        assert q.dtype == DTYPES[quantize] and q.shape == plain.shape and scale.shape == (*plain.shape[:-1], 1)
        assert torch.equal(scale[..., 0], expected_scale)
        whole = ~plain.isnan().any(-1)
        assert torch.equal(q.float()[whole], expected.float()[whole])
        limit, step = (448, 2**-4) if quantize == "fp8" else (127, 0.5 / 127)
        amax = plain[whole].float().abs().amax(-1, keepdim=True)
        assert ((q.float() * scale - plain.float())[whole].abs() <= 1.0001 * amax * step).all()
        assert (q[whole].float().abs().amax(-1, keepdim=True)[amax > 0] == limit).all()
        assert whole.sum() >= 5 and (q.float() * scale)[~whole].isnan().all()


def test_rows_longer_than_a_program_holds(device):
    x, weight = (randn(*s, dtype=torch.bfloat16, device=device) for s in ((2, 20000), (20000,)))
    for quantize in (None, "fp8", "int8"):
        calls = [lambda b: fused.rms_norm(x, weight, 1e-6, quantize=quantize, backend=b),
                 lambda b: fused.act_and_mul(x.repeat(1, 2), "silu", quantize=quantize, backend=b)]  # fmt: skip
        for call in calls:
            actual, expected = call("triton"), call("reference")
            if quantize:
                assert torch.equal(actual[1], expected[1])
                actual, expected = (q[0].to(torch.bfloat16) for q in (actual, expected))
            assert_same(actual, expected)


def test_empty_batches(device):
    x = randn(0, 3, 8, dtype=torch.float32, device=device)
    weight, angles = torch.ones(8, device=device), torch.ones(0, 8, device=device)
    assert fused.rms_norm(x, weight, 1e-6, backend="triton").shape == (0, 3, 8)
    assert fused.layer_norm(x, weight, None, 1e-6, backend="triton").shape == (0, 3, 8)
    assert fused.act_and_mul(x, "silu", backend="triton").shape == (0, 3, 4)
    assert fused.rotary(x, x[:, :1], angles, angles, backend="triton")[1].shape == (0, 1, 8)


def test_refusals_name_the_argument(device):
    x, weight = (randn(*s, dtype=torch.float32, device=device) for s in ((3, 8), (8,)))
    with pytest.raises(ValueError, match="cast 'never'.*weight_before"):
        fused.rms_norm(x, weight, 1e-6, cast="never", backend="triton")
    with pytest.raises(ValueError, match="quantize 'int3'"):
        fused.rms_norm(x, weight, 1e-6, quantize="int3", backend="triton")
    with pytest.raises(ValueError, match="weight must be"):
        fused.rms_norm(x, weight.bfloat16(), 1e-6, backend="triton")
    with pytest.raises(ValueError, match=r"weight must be .*\[8\]"):
        fused.rms_norm(x, weight[:7], 1e-6, backend="triton")
    with pytest.raises(ValueError, match="x must be .*float32, bfloat16 or float16"):
        fused.rms_norm(x.double(), weight, 1e-6, backend="triton")
    with pytest.raises(ValueError, match="contiguous last"):
        fused.rms_norm(x.T, weight[:3], 1e-6, backend="triton")
    with pytest.raises(ValueError, match="residual must be"):
        fused.add_rms_norm(x, x[:2], Norm(weight, 1e-6), backend="triton")
    with pytest.raises(ValueError, match="activation 'relu'.*gelu_tanh"):
        fused.act_and_mul(x, "relu", backend="triton")
    with pytest.raises(ValueError, match="gate_up must be"):
        fused.act_and_mul(x[:, :7], "silu", backend="triton")
    with pytest.raises(ValueError, match="sin must be"):
        fused.rotary(x[:, None], x[:, None], x, x[:2], backend="triton")
    with pytest.raises(ValueError, match="backend 'cuda' is not one of"):
        fused.rms_norm(x, weight, 1e-6, backend="cuda")
