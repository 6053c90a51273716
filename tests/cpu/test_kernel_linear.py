"""The linear kernel against float64 and torch, and the promise that a row's bits are its own."""

import pytest
import torch
import torch.nn.functional as F

from hf_paged_kernels import fused
from hf_paged_kernels.cpu import build
from hf_paged_kernels.cpu.linear import head_linear, linear, supports_linear
from hf_paged_kernels.norm import Norm
from hf_paged_kernels.ref import linear as reference

pytestmark = pytest.mark.skipif(not build.available(), reason=str(build.why_unavailable()))

SHAPES = [(1, 1), (5, 7), (6, 33), (13, 16), (65, 100), (96, 576), (31, 1536), (7, 1537), (50, 4096)]  # N, K


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x, weight, bias=None):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("N, K", SHAPES)
def test_against_float64(N, K):
    weight, bias = randn(N, K, seed=1), randn(N, seed=2)
    for M in (1, 2, 3, 4, 5, 7, 8, 12, 33, 70):
        x = randn(M, K, seed=M)
        magnitude = exact(x.abs(), weight.abs(), bias.abs())  # rounding errors are in proportion to the terms' sizes
        for b in (None, bias):
            error = (linear(x, weight, b).double() - exact(x, weight, b)).abs()
            assert (error / magnitude).max() < 4 * torch.finfo(torch.float32).eps / 2


def test_no_less_accurate_than_torch():
    x, weight = randn(64, 1536), randn(200, 1536, seed=1)
    ours, torchs = ((f(x, weight).double() - exact(x, weight)).pow(2).mean().sqrt() for f in (linear, F.linear))
    assert ours <= 1.1 * torchs


@pytest.mark.parametrize("N, K", SHAPES)
def test_a_row_has_the_same_bits_in_every_batch(N, K):
    weight, bias = randn(N, K, seed=1), randn(N, seed=2)
    x = randn(70, K)
    alone = torch.cat([linear(x[i : i + 1], weight, bias) for i in range(70)])
    for M in (2, 3, 4, 5, 6, 7, 9, 16, 31, 64, 70):
        assert torch.equal(linear(x[:M], weight, bias), alone[:M])
        assert torch.equal(linear(x[70 - M :], weight, bias), alone[70 - M :])


def test_many_rows_have_the_bits_of_few():
    weight, x = randn(40, 576), randn(600, 576, seed=1)  # more rows than stay in L2 together
    assert torch.equal(linear(x, weight), torch.cat([linear(part, weight) for part in x.split(7)]))


def test_a_column_has_the_same_bits_wherever_it_stands():
    weight, x = randn(100, 576), randn(9, 576, seed=1)
    whole = linear(x, weight)
    for begin, end in ((0, 1), (3, 50), (1, 100), (97, 100)):
        assert torch.equal(linear(x, weight[begin:end]), whole[:, begin:end])


def test_threads_do_not_change_bits():
    weight, x = randn(960, 576), randn(37, 576, seed=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_views_by_their_strides_and_live_weights():
    merged = randn(90, 40)
    weight = merged[20:61, 3:36]
    x = randn(11, 50, seed=1)[:, 5:38]
    assert torch.equal(linear(x, weight), linear(x.contiguous(), weight.contiguous()))
    merged.mul_(2)  # an optimizer step: the next call sees it
    assert torch.equal(linear(x, weight), linear(x.contiguous(), weight.contiguous()))


def test_leading_dimensions_and_out():
    weight, bias, x = randn(13, 33), randn(13, seed=1), randn(2, 5, 33, seed=2)
    expected = linear(x.view(10, 33), weight, bias)
    assert torch.equal(linear(x, weight, bias), expected.view(2, 5, 13))
    assert torch.equal(linear(x[0, 0], weight, bias), expected[0])
    room = torch.full((10, 20), 7.0)
    assert torch.equal(linear(x.view(10, 33), weight, bias, room[:, 2:15]), expected)
    assert torch.equal(room[:, 2:15], expected)
    assert (room[:, :2] == 7).all() and (room[:, 15:] == 7).all()
    assert linear(x[:0], weight).shape == (0, 5, 13)
    torch.testing.assert_close(reference.linear(x, weight, bias), linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_refusals():
    weight, x = randn(8, 16), randn(3, 16)
    assert supports_linear(x, weight)
    for bad_x, bad_weight in ((x.half(), weight.half()), (x.bfloat16(), weight), (x.double(), weight), (x[:, :9], weight),
                              (x, randn(16, 8).T)):  # fmt: skip
        assert not supports_linear(bad_x, bad_weight)
        with pytest.raises(ValueError, match="linear takes float32"):
            linear(bad_x, bad_weight)
    with pytest.raises(ValueError, match="bias"):
        linear(x, weight, randn(7))
    with pytest.raises(ValueError, match="out"):
        linear(x, weight, None, torch.empty(3, 9))


HEAD_SHAPES = [(1, 1, 1), (2, 5, 7), (3, 16, 64), (1, 65, 100), (4, 128, 512), (2, 200, 33)]  # H, K, N
LAYOUTS = ["along_n", "along_k"]


def head_weight(H, K, N, layout):
    """[H, K, N], a view into a larger weight."""
    shape = (H, K + 3, N) if layout == "along_n" else (H, N + 3, K)
    weight = randn(*shape, seed=1)
    return weight[:, 1 : K + 1] if layout == "along_n" else weight[:, 2 : N + 2].transpose(1, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("H, K, N", HEAD_SHAPES)
def test_heads_against_float64(H, K, N, layout):
    weight, bias = head_weight(H, K, N, layout), randn(N, seed=2)
    for M in (1, 2, 5, 6, 7, 13, 40):
        x = randn(M, H, K + 2, seed=M)[..., :K].transpose(0, 1)
        for b in (None, bias):
            exact = x.double() @ weight.double() + (0 if b is None else b.double())
            magnitude = x.double().abs() @ weight.double().abs() + bias.abs()
            out = head_linear(x, weight, b)
            assert out.shape == (H, M, N)
            assert ((out - exact).abs() / magnitude).max() < K**0.5 * torch.finfo(torch.float32).eps + 1e-7


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("H, K, N", HEAD_SHAPES)
def test_a_row_of_a_head_has_the_same_bits_in_every_batch(H, K, N, layout):
    weight, x = head_weight(H, K, N, layout), randn(H, 40, K)
    alone = torch.cat([head_linear(x[:, i : i + 1], weight) for i in range(40)], dim=1)
    for M in (2, 3, 5, 6, 7, 12, 13, 40):
        assert torch.equal(head_linear(x[:, :M], weight), alone[:, :M])
        assert torch.equal(head_linear(x[:, 40 - M :], weight), alone[:, 40 - M :])
    for head in range(H):
        assert torch.equal(head_linear(x[head : head + 1], weight[head : head + 1]), alone[head : head + 1])


def test_heads_refuse_what_does_not_fit():
    x, weight = randn(2, 3, 8), randn(2, 8, 4)
    for bad in (x.double(), x[:1], x[..., :7], x.transpose(1, 2)):
        with pytest.raises(ValueError, match="head_linear takes"):
            head_linear(bad, weight)
    with pytest.raises(ValueError, match="bias must be"):
        head_linear(x, weight, randn(5))


def test_norm_activation_and_residual_are_the_separate_kernels():
    """Bit for bit: one call of `fused.linear` is the calls it stands for."""
    norm = Norm(randn(48, seed=1), 1e-6, 1.0, "weight_before")
    x, weight, bias, residual = randn(5, 48), randn(64, 48, seed=2), randn(64, seed=3), randn(5, 32, seed=4)
    for backend in ("cpu", "reference"):
        normed = fused.rms_norm(x, norm.weight, norm.eps, offset=1.0, cast=norm.cast, backend=backend)
        gated = fused.act_and_mul(fused.linear(normed, weight, bias, backend=backend), "silu", backend=backend)
        once = fused.linear(x, weight, bias, norm=norm, activation="silu", residual=residual, backend=backend)
        assert torch.equal(once, residual + gated)
    with pytest.raises(ValueError, match=r"residual must be torch.float32 \[5, 64\]"):
        fused.linear(x, weight, residual=residual)


@pytest.mark.parametrize("N, K", [(13, 100), (7, 33), (50, 3001), (96, 1536)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_row_in_bfloat16_is_rounded_once_and_has_bits_of_its_own(N, K, with_bias):
    weight, x, bias = (randn(*size).bfloat16() for size in ((N, K), (600, K), (N,)))
    y = linear(x, weight, bias if with_bias else None)
    truth = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    assert y.dtype == torch.bfloat16
    assert (y != truth.bfloat16()).float().mean() < 0.03  # the sum in fp32 may fall on the other side of a half
    torch.testing.assert_close(y.double(), truth, rtol=2**-7, atol=1e-3 * K**0.5)
    for first, last in ((0, 1), (3, 4), (5, 14), (100, 600)):
        assert torch.equal(linear(x[first:last].clone(), weight, bias if with_bias else None), y[first:last])
    room = torch.full((600, N + 5), 7.0, dtype=torch.bfloat16)
    assert torch.equal(linear(x, weight, bias if with_bias else None, room[:, 2 : N + 2]), y)
    assert (room[:, :2] == 7).all() and (room[:, N + 2 :] == 7).all()
