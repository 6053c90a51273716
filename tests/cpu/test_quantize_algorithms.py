"""Rounding to nearest, GPTQ and AWQ on plain tensors: what they promise about a layer's output."""

from __future__ import annotations

import pytest
import torch

from hf_paged import InvalidArgument
from hf_paged.quant.awq import round_clipped, search_scales
from hf_paged.quant.formats.gptq import GPTQ
from hf_paged.quant.gptq import Gptq, gptq
from hf_paged.quant.moments import Moments
from hf_paged.quant.rounding import Scheme, round_to_fp8, round_to_nearest

N, K, T = 64, 128, 1024
GRIDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


@pytest.fixture
def weight():
    return torch.randn(N, K) / K**0.5


@pytest.fixture
def inputs():
    """Correlated, of different sizes, with a few channels of outliers."""
    x = torch.randn(T, K) * torch.linspace(0.2, 2, K) @ torch.randn(K, K) / K**0.5
    x[:, [3, 50, 99]] *= 12
    return x


def moments_of(x) -> Moments:
    moments = Moments(x.shape[-1])
    for part in x.split(100):
        moments.add(part)
    return moments


def output_error(quantized, weight, x) -> float:
    """As a share of the output, of an input that was not calibrated on if `x` was not."""
    y = x @ weight.T
    return ((x @ quantized.dequantize().T - y).norm() / y.norm()).item()


def stored_again(quantized, scheme):
    """What comes back from a GPTQ checkpoint."""
    format = GPTQ(scheme.bits, scheme.group_size)
    return format.pack(format.unpack(quantized), *quantized.shape)


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_gptq_beats_rounding_to_nearest(weight, inputs, bits, symmetric):
    scheme = Scheme(bits, 32, symmetric, zero_from=1)
    moments, unseen = moments_of(inputs), inputs[torch.randperm(T)][: T // 2] * 1.1
    nearest = output_error(round_to_nearest(weight, scheme), weight, unseen)
    plain = output_error(gptq(weight, moments, scheme, Gptq(act_order=False)), weight, unseen)
    ordered = output_error(gptq(weight, moments, scheme, Gptq(static_groups=False)), weight, unseen)
    static = output_error(gptq(weight, moments, scheme), weight, unseen)
    assert plain < 0.8 * nearest
    assert ordered < plain and static < plain


def test_awq_beats_rounding_to_nearest_where_channels_have_outliers(weight, inputs):
    scheme = Scheme(4, 32, symmetric=False)
    moments = moments_of(inputs)
    nearest = output_error(round_to_nearest(weight, scheme), weight, inputs)
    clipped = output_error(round_clipped(weight, moments, scheme), weight, inputs)
    scales = search_scales([weight], moments, scheme)
    moments.divide_(scales)
    scaled = output_error(round_clipped(weight * scales, moments, scheme), weight * scales, inputs / scales)
    assert scales.max() / scales.min() > 2
    assert clipped < nearest and scaled < 0.8 * nearest and scaled < clipped


def test_moments_of_scaled_inputs(inputs):
    scales = torch.rand(K) + 0.5
    scaled, expected = moments_of(inputs), moments_of(inputs / scales)
    scaled.divide_(scales)
    torch.testing.assert_close(scaled.second, expected.second, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scaled.magnitude, expected.magnitude, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["nearest", "gptq", "act-order", "static"])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_a_gptq_checkpoint_holds_it_all(weight, inputs, bits, symmetric, method):
    scheme = Scheme(bits, 32, symmetric, zero_from=1)
    if method == "nearest":
        quantized = round_to_nearest(weight, scheme)
    else:
        options = Gptq(act_order=method != "gptq", static_groups=method == "static")
        quantized = gptq(weight, moments_of(inputs), scheme, options)
    assert torch.equal(stored_again(quantized, scheme).dequantize(), quantized.dequantize())
    assert (quantized.perm is not None) == (method == "act-order")


def test_every_value_is_a_nearest_point_of_its_grid(weight):
    """But for those beyond its ends."""
    quantized = round_to_nearest(weight, Scheme(4, 32))
    scales = quantized.scales.float().T.repeat_interleave(32, 1)
    inside = (weight >= -8 * scales) & (weight <= 7 * scales)
    assert inside.float().mean() > 0.9
    assert ((quantized.dequantize() - weight).abs() <= scales * 0.501)[inside].all()


def test_narrow_grids_cut_off_rare_values(weight):
    """Of a range of values with one far out, the grid that gives the least error is not the widest."""
    weight[:, 5] *= 3
    scheme = Scheme(3, -1)
    widest = 2 * weight.abs().amax(1) / 7
    scales = round_to_nearest(weight, scheme).scales[0].float()
    assert (scales < 0.95 * widest).float().mean() > 0.9


@pytest.mark.parametrize("weights", ["zeros", "positive", "negative", "huge", "tiny"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_unusual_weights(symmetric, weights):
    """Groups of zeros stay zeros, one-sided groups use their grid, and scales stay finite and above 0 in fp16."""
    values = {"zeros": torch.zeros(N, K), "positive": torch.rand(N, K) + 0.5, "negative": -torch.rand(N, K) - 0.5,
              "huge": torch.randn(N, K) * 1e5, "tiny": torch.randn(N, K) * 1e-6}[weights]  # fmt: skip
    scheme = Scheme(4, 32, symmetric, zero_from=1)
    quantized = round_to_nearest(values, scheme)
    assert quantized.scales.isfinite().all() and (quantized.scales > 0).all()
    again = stored_again(quantized, scheme).dequantize()
    assert (again - values).norm() <= 0.12 * values.norm()
    if not symmetric and weights in ("positive", "negative"):
        assert (again - values).norm() <= 0.035 * values.norm()


def test_inputs_that_never_differ_from_zero(weight, inputs):
    inputs[:, 7] = 0
    scheme = Scheme(4, 32)
    quantized = gptq(weight, moments_of(inputs), scheme)
    error = (quantized.dequantize() - weight)[:, 7].abs()
    assert error.max() < 0.1 and output_error(quantized, weight, inputs) < 0.1
    nothing = gptq(weight, Moments(K), scheme, Gptq(act_order=False))
    assert (nothing.dequantize() - weight).norm() / weight.norm() < 0.15


def test_singular_moments_are_damped(weight):
    """Fewer inputs than channels, all of them the same."""
    x = torch.randn(1, K).expand(8, -1)
    quantized = gptq(weight, moments_of(x), Scheme(4, 32), Gptq(damping=1e-9))
    assert output_error(quantized, weight, x) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8(weight, dtype):
    weight = weight.to(dtype)
    weight[3] = 0
    quantized = round_to_fp8(weight)
    assert quantized.kind == "fp8" and quantized.activations == "fp8" and quantized.scales.dtype == dtype
    difference = (quantized.dequantize() - weight.float()).abs()
    largest = weight.float().abs().amax(1, keepdim=True)
    assert (difference <= 0.0725 * weight.float().abs() + largest / 448 * 2**-9).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme(5), "bits must be one of 2, 3, 4, 8, got 5"),
        (lambda: Scheme(4, 48), "group_size must be -1 or one of"),
        (lambda: round_to_nearest(torch.randn(16, 48), Scheme(4, 32)), "group_size 32 does not divide 48"),
        (lambda: Gptq(damping=0), "damping must be above 0"),
        (lambda: gptq(torch.randn(16, 32), moments_of(torch.full((4, 32), torch.inf)), Scheme(4, 32)), "not finite"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()
