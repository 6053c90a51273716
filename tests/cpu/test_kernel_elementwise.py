"""The fused elementwise kernels against plain torch and against transformers' own modules."""

import math

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as partial_rotary_pos_emb

from hf_paged_kernels.cpu import build, elementwise
from hf_paged_kernels.ref import elementwise as reference

pytestmark = pytest.mark.skipif(not build.available(), reason=str(build.why_unavailable()))

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# One unit in the last place of each dtype, relative; a sum in another order may move a rounding by one.
STEP = {torch.float32: 2.4e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SIZES = [1, 7, 16, 33, 64, 576, 1000]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual, expected, rtol, atol=0.0):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "module, options",
    [
        (LlamaRMSNorm, {"cast": "weight_after"}),
        (Olmo2RMSNorm, {"cast": "weight_before"}),
        (Gemma2RMSNorm, {"cast": "weight_before", "offset": 1.0}),
        (Gemma3RMSNorm, {"cast": "weight_before", "offset": 1.0}),
    ],
)
def test_rms_norm_matches_the_modules_of_transformers(module, options, dtype):
    for H in SIZES:
        norm = module(H, eps=1e-5).to(dtype)
        norm.weight.data = randn(H, dtype=dtype, seed=1)
        x = randn(9, H, dtype=dtype, seed=2) * 3
        actual = elementwise.rms_norm(x, norm.weight.data, 1e-5, **options)
        expected = norm(x).detach()
        assert_close(actual, expected, rtol=2 * STEP[dtype], atol=1e-7)
        if dtype != torch.float32:  # the rounding points are the same: nearly every value is, bit for bit
            assert (actual == expected).float().mean() > 0.98


def test_the_order_of_cast_and_weight_shows_in_bfloat16():
    x, weight = randn(50, 256, dtype=torch.bfloat16), randn(256, dtype=torch.bfloat16, seed=1)
    after = elementwise.rms_norm(x, weight, 1e-6, cast="weight_after")
    before = elementwise.rms_norm(x, weight, 1e-6, cast="weight_before")
    assert (after != before).float().mean() > 0.1


@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm_without_weight_and_with_offset_after_the_cast(dtype):
    x, weight = randn(5, 65, dtype=dtype), randn(65, dtype=dtype, seed=1)
    for w, offset in ((None, 0.0), (weight, 1.0)):
        options = {"offset": offset, "cast": "weight_after"}
        actual, expected = (m.rms_norm(x, w, 1e-6, **options) for m in (elementwise, reference))
        assert_close(actual, expected, rtol=2 * STEP[dtype], atol=1e-7)


def test_rms_norm_against_float64():
    for H in (33, 576, 4099):
        x, weight = randn(20, H) * 10, randn(H, seed=1)
        wide = x.double()
        expected = weight.double() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        actual = elementwise.rms_norm(x, weight, 1e-5)
        assert_close(actual.double(), expected, rtol=4e-7)


def test_rms_norm_reads_views_by_their_strides():
    weight = randn(16, seed=1)
    merged = randn(11, 5 * 16 + 3)  # heads of a merged projection, rows with a gap behind them
    heads = merged[:, 16:64].view(11, 3, 16)
    for view in (heads, merged[:, 3:19], heads.transpose(0, 1), heads[None], heads[:, 0], heads[0, 0]):
        actual = elementwise.rms_norm(view, weight, 1e-6)
        assert actual.is_contiguous() and actual.shape == view.shape
        assert torch.equal(actual, elementwise.rms_norm(view.contiguous(), weight, 1e-6))
        assert_close(actual, reference.rms_norm(view, weight, 1e-6), rtol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_act_and_mul(activation, dtype):
    for width in SIZES:
        gate_up = randn(7, 2 * width + 5, dtype=dtype)[:, 3 : 3 + 2 * width] * 4
        actual = elementwise.act_and_mul(gate_up, activation)
        expected = reference.act_and_mul(gate_up, activation)
        # torch's own gelu loses digits where 1 + erf(x) cancels: see the test against float64
        assert_close(actual, expected, rtol=4 * STEP[dtype], atol=1e-5 if dtype == torch.float32 else 1e-3)
        if dtype != torch.float32 and width > 500:
            assert (actual == expected).float().mean() > 0.98


@pytest.mark.parametrize(
    "activation, formula",
    [
        ("silu", lambda x: x * torch.sigmoid(x)),
        ("gelu", lambda x: x * 0.5 * torch.special.erfc(-x / math.sqrt(2))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ],
)
def test_activations_against_float64(activation, formula):
    gate = torch.linspace(-8, 8, 20001)
    actual = elementwise.act_and_mul(torch.cat((gate, torch.ones_like(gate)))[None], activation)[0]
    assert_close(actual.double(), formula(gate.double()), rtol=4e-7, atol=5e-7)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_at_the_ends(activation):
    gate = torch.tensor([-1e30, -200.0, -90.0, -20.0, -1.0, -0.0, 0.0, 1.0, 20.0, 200.0, 1e30])
    actual = elementwise.act_and_mul(torch.cat((gate, torch.ones_like(gate)))[None], activation)[0]
    expected = reference.act_and_mul(torch.cat((gate, torch.ones_like(gate)))[None], activation)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    nan = torch.tensor([[float("nan"), 1.0]])
    assert elementwise.act_and_mul(nan, activation).isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D, R", [(16, 16), (64, 64), (80, 32), (10, 6), (96, 96)])
def test_rotary_has_the_bits_of_transformers(D, R, dtype):
    T, q_heads, k_heads = 13, 5, 2
    merged = randn(T, (q_heads + 2 * k_heads) * D, dtype=dtype)
    q = merged[:, : q_heads * D].view(T, q_heads, D)
    k = merged[:, q_heads * D : (q_heads + k_heads) * D].view(T, k_heads, D)
    angles = randn(T, R // 2, seed=5) * 50
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    formula = apply_rotary_pos_emb if R == D else partial_rotary_pos_emb
    expected = formula(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    for actual, wanted in zip(elementwise.rotary(q, k, cos, sin), expected):
        assert actual.is_contiguous()
        assert torch.equal(actual, wanted[0].transpose(0, 1))
    for actual, wanted in zip(reference.rotary(q, k, cos, sin), expected):
        assert torch.equal(actual, wanted[0].transpose(0, 1))


def test_head_major_queries():
    q, k = (randn(heads, 9, 32, seed=heads).transpose(0, 1) for heads in (4, 2))
    cos, sin = randn(9, 32, seed=7), randn(9, 32, seed=8)  # halves that differ: each is used where it belongs
    for actual, expected in zip(elementwise.rotary(q, k, cos, sin), reference.rotary(q, k, cos, sin)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_do_not_depend_on_their_neighbours_or_on_threads(dtype):
    """Big enough for several threads: 900 rows of 576 are many times the grain."""
    x, weight = randn(900, 576, dtype=dtype), randn(576, dtype=dtype, seed=1)
    heads = x.view(900, 9, 64)
    cos, sin = randn(900, 64, dtype=dtype, seed=2), randn(900, 64, dtype=dtype, seed=3)

    def everything(rows):
        return [
            elementwise.rms_norm(x[rows], weight, 1e-6),
            elementwise.act_and_mul(x[rows], "gelu_tanh"),
            elementwise.act_and_mul(x[rows], "silu"),
            *elementwise.rotary(heads[rows], heads[rows], cos[rows], sin[rows]),
        ]

    threads = torch.get_num_threads()
    batch = everything(slice(None))
    try:
        torch.set_num_threads(1)
        alone = [torch.cat(parts) for parts in zip(*(everything(slice(i, i + 1)) for i in range(900)))]
    finally:
        torch.set_num_threads(threads)
    for one, many in zip(alone, batch):
        assert torch.equal(one, many)


def test_empty_batches():
    assert elementwise.rms_norm(randn(0, 8), randn(8), 1e-6).shape == (0, 8)
    assert elementwise.act_and_mul(randn(0, 8), "silu").shape == (0, 4)
    q_out, k_out = elementwise.rotary(randn(0, 3, 8), randn(0, 1, 8), randn(0, 8), randn(0, 8))
    assert q_out.shape == (0, 3, 8) and k_out.shape == (0, 1, 8)


def test_refusals_name_the_argument():
    x, weight = randn(3, 8), randn(8)
    with pytest.raises(ValueError, match="cast.*weight_before"):
        elementwise.rms_norm(x, weight, 1e-6, cast="never")
    with pytest.raises(ValueError, match="weight"):
        elementwise.rms_norm(x, weight.double(), 1e-6)
    with pytest.raises(ValueError, match="weight"):
        elementwise.rms_norm(x, randn(7), 1e-6)
    with pytest.raises(ValueError, match="x must be"):
        elementwise.rms_norm(x.double(), weight, 1e-6)
    with pytest.raises(ValueError, match="contiguous last"):
        elementwise.rms_norm(randn(8, 3).T, weight, 1e-6)
    with pytest.raises(ValueError, match="activation.*gelu_tanh"):
        elementwise.act_and_mul(x, "relu")
    with pytest.raises(ValueError, match="even"):
        elementwise.act_and_mul(randn(3, 7), "silu")
    with pytest.raises(ValueError, match="rotary takes"):
        elementwise.rotary(randn(3, 2, 8), randn(3, 1, 8), randn(2, 8), randn(2, 8))
    with pytest.raises(ValueError, match="one dtype"):
        elementwise.rotary(randn(3, 2, 8), randn(3, 1, 8), randn(3, 8).bfloat16(), randn(3, 8))
