"""Linear layers of int8 weights and int8 inputs: exact integer sums, and the reference's rounding of rows."""

import pytest
import torch

from hf_paged_kernels import fused
from hf_paged_kernels.cpu import build, quantized
from hf_paged_kernels.cpu.linear import linear as dense
from hf_paged_kernels.quantized import QuantizedWeight, pack
from hf_paged_kernels.ref import quantized as reference
from hf_paged_kernels.ref.quantize import quantize

pytestmark = pytest.mark.skipif(not build.available(), reason=str(build.why_unavailable()))

CASES = [  # N, K, (rows, columns) that share a scale
    (1, 1, (1, 1)), (5, 7, (5, 7)), (13, 64, (1, 64)), (50, 576, (1, 576)), (31, 1000, (16, 1000)), (9, 1536, (1, 128)),
    (10, 300, (1, 48)), (7, 40, (3, 16)), (4, 65536, (1, 65536)),
]  # fmt: skip


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(N, K, block, *, experts=(), dtype=torch.float32, **attributes):
    random = torch.Generator().manual_seed(N * K)
    data = torch.randint(-128, 128, (*experts, N, K), generator=random, dtype=torch.int8)
    blocks = (*experts, -(-K // block[1]), -(-N // block[0]))
    scales = (torch.rand(blocks, generator=random) * 0.01 + 0.001).to(dtype)
    return QuantizedWeight("int8", K, data, scales, block=block, activations="int8", **attributes)


def exact(q, x_scale, weight, bias=None):
    """The kernel's own formula, on integers q [M, K] of the input; scales [M]."""
    rows, columns = weight.block
    N, total = weight.shape[-2], torch.zeros(len(q), weight.shape[-2])
    for block, scales in enumerate(weight.scales.float()):
        part = slice(block * columns, (block + 1) * columns)
        sums = q[:, part].double() @ weight.data[:, part].double().T  # integers, exactly
        total += sums.to(torch.int32).float() * scales.repeat_interleave(rows)[:N]
    return total * x_scale[:, None] + (0 if bias is None else bias)


@pytest.mark.parametrize("N, K, block", CASES)
def test_sums_are_exact(N, K, block):
    bias = randn(N, seed=2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = make(N, K, block, dtype=dtype)
        for M in (1, 2, 3, 5, 6, 7, 13, 40):
            x = randn(M, K, seed=M)
            assert torch.equal(quantized.linear(x, weight, bias), exact(*quantize(x, torch.int8), weight, bias))


def test_the_largest_sums():
    weight = QuantizedWeight("int8", 65536, torch.full((2, 65536), -128, dtype=torch.int8), torch.ones(1, 2),
                             block=(1, 65536), activations="int8")  # fmt: skip
    for sign in (1, -1):
        x = torch.full((1, 65536), 127.0 * sign)
        assert quantized.linear(x, weight).tolist() == [[-128.0 * 127 * 65536 * sign] * 2]


def test_the_references_results():
    weight, bias, x = make(65, 576, (1, 576)), randn(65), randn(2, 4, 576, seed=1)
    close = dict(rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(quantized.linear(x, weight, bias), reference.linear(x, weight, bias), **close)
    perm = torch.randperm(576, generator=torch.Generator().manual_seed(1)).int()
    ordered = make(65, 576, (1, 576), perm=perm)
    torch.testing.assert_close(quantized.linear(x, ordered), reference.linear(x, ordered), **close)
    half = x.bfloat16()
    assert torch.equal(quantized.linear(half, weight), quantized.linear(half.float(), weight).bfloat16())


def test_one_scale_for_all_inputs():
    scale, x = torch.tensor([0.011]), randn(5, 576)
    weight = make(33, 576, (1, 576), input_scale=scale)
    q = (x / scale).clamp(-127, 127).round()
    assert (q.abs() == 127).any()  # some are cut off
    assert torch.equal(quantized.linear(x, weight), exact(q, scale.expand(5), weight))


def test_rows_that_are_not_finite_or_all_zero_harm_no_other():
    x = randn(4, 100)
    x[1, 5], x[2, 7], x[3] = torch.nan, torch.inf, 0
    weight = make(9, 100, (1, 100))
    y = quantized.linear(x, weight)
    assert torch.equal(y[:1], quantized.linear(x[:1], weight))
    assert y[1:3].isnan().all() and (y[3] == 0).all()
    fixed = make(9, 100, (1, 100), input_scale=torch.tensor([0.02]))
    y = quantized.linear(x, fixed)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()


def test_a_row_has_the_same_bits_in_every_batch_and_on_every_thread():
    weight, x = make(300, 576, (1, 64)), randn(700, 576)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([quantized.linear(row, weight) for row in x.split(1)])
        for n in (1, 2):
            torch.set_num_threads(n)
            for M in (2, 5, 9, 700):
                assert torch.equal(quantized.linear(x[:M], weight), alone[:M])
                assert torch.equal(quantized.linear(x[700 - M :], weight), alone[700 - M :])
    finally:
        torch.set_num_threads(threads)


def test_views():
    weight, x = make(96, 576, (1, 576)), randn(6, 700)[:, 50:626]
    whole = quantized.linear(x, weight)
    assert torch.equal(whole, quantized.linear(x.contiguous(), weight))
    assert torch.equal(torch.cat([quantized.linear(x, part) for part in weight.split([10, 50, 36])], -1), whole)


def test_experts_are_layers_of_their_own():
    E, N, K, k = 5, 22, 80, 2
    weight, bias = make(N, K, (1, 16), experts=(E,)), randn(E, N)
    x, experts = randn(9, K), torch.randint(E, (18,), generator=torch.Generator().manual_seed(0))
    y = fused.grouped_linear(x, weight, experts, bias, backend="cpu")
    for s, expert in enumerate(experts.tolist()):
        one = weight.with_tensors({"data": weight.data[expert], "scales": weight.scales[expert]})
        assert torch.equal(y[s], quantized.linear(x[s // k], one, bias[expert]))


def test_inputs_are_rounded_for_other_weights_too():
    """Weights that cannot be multiplied as int8: packed ones, those with zeros, rows that are too long."""
    x, random = randn(5, 96), torch.Generator().manual_seed(0)
    packed = QuantizedWeight("int4", 96, pack(torch.randint(16, (8, 96), generator=random), "int4"),
                             torch.rand(6, 8, generator=random), block=(1, 16), activations="int8")  # fmt: skip
    shifted = make(8, 96, (1, 16))
    shifted = shifted.with_tensors({"zeros": torch.full((6, 8), 3, dtype=torch.int16)})
    long = make(2, 65600, (1, 65600))
    for weight, inputs in ((packed, x), (shifted, x), (long, randn(3, 65600))):
        rounded = reference.rounded_rows(inputs, weight)
        assert not torch.equal(rounded, inputs)
        assert torch.equal(quantized.linear(inputs, weight), dense(rounded, weight.dequantize()))
