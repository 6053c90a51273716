"""Linear layers on quantized weights: bit for bit the dense kernel on the dequantized weight."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_paged_kernels import fused
from hf_paged_kernels.cpu import build, quantized
from hf_paged_kernels.cpu.linear import linear as dense
from hf_paged_kernels.norm import Norm
from hf_paged_kernels.quantized import BITS, QuantizedWeight, cat, pack
from hf_paged_kernels.ref import quantized as reference

pytestmark = pytest.mark.skipif(not build.available(), reason=str(build.why_unavailable()))

# N, K, (rows, columns) that share a scale; None: all columns
PACKED = [(13, 48, 1, 16), (97, 576, 1, 64), (40, 1536, 1, 32), (7, 33, 1, None), (31, 1000, 1, None),
          (20, 1808, 1, 128)]  # fmt: skip
BYTES = [(50, 300, 16, 128), (9, 1000, 9, None), (33, 40, 1, 16)]
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 40)
CASES = [(kind, *case) for kind in BITS for case in PACKED + BYTES * (kind in ("int8", "fp8"))]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def make(kind, N, K, rows=1, columns=None, *, zeros=False, dtype=torch.float16, experts=(), **attributes):
    """A random weight that uses every value there is."""
    random, columns, bits = generator(N * K), columns or K, BITS[kind]
    blocks = (*experts, -(-K // columns), -(-N // rows))
    scales = (torch.rand(blocks, generator=random) * 0.01 + 0.001).to(dtype)
    if kind in ("int2", "int3", "int4"):
        data = pack(torch.randint(1 << bits, (*experts, N, K), generator=random), kind)
    elif kind == "int8":
        data = torch.randint(-128, 128, (*experts, N, K), generator=random, dtype=torch.int8)
    else:
        codes = torch.randint(-128, 128, (*experts, N, K), generator=random, dtype=torch.int8)
        data = codes.where((codes & 127) != 127, 0).view(torch.float8_e4m3fn)  # 127 is NaN
    zeros = zeros and kind != "fp8"
    z = torch.randint(-3, (1 << bits) + 2, blocks, generator=random).to(torch.int16) if zeros else None
    return QuantizedWeight(kind, K, data, scales, z, (rows, columns), **attributes)


@pytest.mark.parametrize("kind, N, K, rows, columns", CASES)
def test_the_bits_of_the_dense_kernel_on_the_dequantized_weight(kind, N, K, rows, columns):
    bias = randn(N, seed=2)
    for zeros, dtype in ((False, torch.float16), (True, torch.float32), (True, torch.bfloat16)):
        weight = make(kind, N, K, rows, columns, zeros=zeros, dtype=dtype)
        dequantized = weight.dequantize()
        for M in ROWS:
            x = randn(M, K, seed=M)
            assert torch.equal(quantized.linear(x, weight, bias), dense(x, dequantized, bias)), (zeros, dtype, M)
        assert torch.equal(quantized.linear(x, weight), dense(x, dequantized))


@pytest.mark.parametrize("kind", BITS)
def test_a_row_has_the_same_bits_in_every_batch_and_on_every_thread(kind):
    weight, x = make(kind, 300, 576, columns=64), randn(70, 576)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([quantized.linear(x[i : i + 1], weight) for i in range(70)])
        for n in (1, 2):
            torch.set_num_threads(n)
            for M in (2, 5, 9, 31, 70):
                assert torch.equal(quantized.linear(x[:M], weight), alone[:M])
                assert torch.equal(quantized.linear(x[70 - M :], weight), alone[70 - M :])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_inputs_are_rounded_once(dtype):
    weight, bias, x = make("int4", 65, 576, columns=64), randn(65, seed=1).to(dtype), randn(5, 576, seed=2).to(dtype)
    y = fused.linear(x, weight, bias, backend="cpu")
    assert y.dtype == dtype
    assert torch.equal(y, dense(x.float(), weight.dequantize(), bias.float()).to(dtype))


def test_parts_and_views():
    weight, x = make("int4", 96, 576, columns=64, zeros=True), randn(3, 2, 700)[..., 50:626]
    whole = quantized.linear(x, weight)
    assert whole.shape == (3, 2, 96)
    parts = weight.split([10, 50, 36])
    assert torch.equal(torch.cat([quantized.linear(x, part) for part in parts], -1), whole)
    assert torch.equal(quantized.linear(x, cat(parts)), whole)
    assert torch.equal(quantized.linear(x[1, 1], weight), whole[1, 1])
    assert quantized.linear(x[:0], weight).shape == (0, 2, 96)
    backwards = randn(576, 4).t()
    assert torch.equal(quantized.linear(backwards, weight), quantized.linear(backwards.contiguous(), weight))


def test_live_weights():
    weight, x = make("int4", 40, 576, columns=64, zeros=True), randn(2, 576)
    quantized.linear(x, weight)
    weight.scales.mul_(2)
    for tensor in weight.tensors().values():
        tensor.share_memory_()  # moves its memory
    assert torch.equal(quantized.linear(x, weight), dense(x, weight.dequantize()))


def test_the_order_of_columns():
    perm = torch.randperm(576, generator=generator()).int()
    weight, x = make("int4", 40, 576, columns=64, zeros=True, perm=perm), randn(6, 576)
    in_order = make("int4", 40, 576, columns=64, zeros=True)
    assert torch.equal(quantized.linear(x, weight), dense(x[:, perm.long()], in_order.dequantize()))
    torch.testing.assert_close(quantized.linear(x, weight), reference.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_fp8_has_every_value_of_its_type():
    codes = torch.arange(-128, 128, dtype=torch.int8).view(torch.float8_e4m3fn)
    weight = QuantizedWeight("fp8", 1, codes[:, None], torch.ones(1, 1), block=(256, 1))
    y = quantized.linear(torch.ones(1, 1), weight)[0]
    torch.testing.assert_close(y, codes.float(), rtol=0, atol=0, equal_nan=True)
    assert y.isnan().sum() == 2
    wide = QuantizedWeight("fp8", 256, codes.repeat(3, 1), torch.ones(1, 3), block=(1, 256))
    assert quantized.linear(torch.zeros(2, 256), wide).isnan().all()


def test_one_call_is_the_calls_it_stands_for():
    norm = Norm(randn(48, seed=1), 1e-6, 1.0, "weight_before")
    weight, bias, x, residual = make("int4", 64, 48), randn(64, seed=3), randn(5, 48), randn(5, 32, seed=4)
    options = dict(norm=norm, activation="silu", residual=residual, backend="cpu")
    once = fused.linear(x, weight, bias, **options)
    assert torch.equal(once, fused.linear(x, weight.dequantize(), bias, **options))
    assert fused.supports_linear(weight)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("kind", BITS)
def test_experts_are_layers_of_their_own(kind, activation):
    E, N, K, k = 6, 40, 80, 2
    weight, bias = make(kind, N, K, columns=16, zeros=True, experts=(E,)), randn(E, N)
    x, experts = randn(9, K), torch.randint(E, (18,), generator=generator())
    scale = torch.rand(18, generator=generator(1))
    y = fused.grouped_linear(x, weight, experts, bias, activation=activation, scale=scale, backend="cpu")
    for s, expert in enumerate(experts.tolist()):
        row = dense(x[s // k], weight.dequantize()[expert], bias[expert])
        row = row if activation is None else fused.act_and_mul(row, activation)
        assert torch.equal(y[s], row * scale[s])
    few = fused.grouped_linear(x[:1], weight, experts[:2], bias, activation=activation, backend="cpu")
    assert torch.equal(few * scale[:2, None], y[:2])
    assert fused.grouped_linear(x[:0], weight, experts[:0], bias, backend="cpu").shape == (0, N)


def test_what_there_is_no_kernel_for_goes_to_the_reference():
    x = randn(4, 96)
    fp8 = make("fp8", 8, 96, columns=16)
    for weight in (make("int4", 8, 96, columns=24), make("int8", 8, 96, columns=16, dtype=torch.float64),
                   fp8.with_tensors({"zeros": torch.ones(fp8.scales.shape, dtype=torch.int16)})):  # fmt: skip
        assert not quantized.supports_weight(weight) and not fused.supports_linear(weight)
        assert torch.equal(fused.linear(x, weight, backend="cpu"), reference.linear(x, weight))
    assert not quantized.supports(x.double(), make("int4", 8, 96), None, None, None)


@pytest.mark.slow  # compiles everything twice more
@pytest.mark.parametrize("wanted", ["avx2", "default"])
def test_other_instruction_sets_give_the_same(wanted):
    """These very tests and those of int8 inputs, where torch's own switch picks other instructions."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": wanted}
    files = [__file__, str(Path(__file__).with_name("test_kernel_quantized_int8.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout
