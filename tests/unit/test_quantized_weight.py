"""The layout of quantized weights: written down here a second time, value by value."""

from __future__ import annotations

import pytest
import torch

from hf_paged_kernels import fused
from hf_paged_kernels.quantized import BITS, FIELDS, QuantizedWeight, cat, pack, unpack, why_not_joined


def random_weight(kind: str, N: int, K: int, block=(1, 32), zeros=False, perm=False, experts=None, **more):
    lead = () if experts is None else (experts,)
    if kind == "fp8":
        data = torch.randn(*lead, N, K).to(torch.float8_e4m3fn)
    elif kind == "int8":
        data = torch.randint(-128, 128, (*lead, N, K), dtype=torch.int8)
    else:
        data = pack(torch.randint(0, 1 << BITS[kind], (*lead, N, K), dtype=torch.uint8), kind)
    rows, columns = block
    shape = (*lead, -(-K // columns), -(-N // rows))
    return QuantizedWeight(
        kind=kind,
        in_features=K,
        data=data,
        scales=torch.rand(shape) / 100,
        zeros=torch.randint(-3, 17, shape, dtype=torch.int16) if zeros else None,
        block=block,
        perm=torch.randperm(K).int() if perm else None,
        **more,
    )


def field(words: torch.Tensor, kind: str, n: int, k: int) -> int:
    """Value k of row n, found as the module's docstring says."""
    block, within = divmod(k, 16 * FIELDS[kind])
    place, lane = divmod(within, 16)
    word = words[n, 16 * block + lane].item() & 0xFFFFFFFF
    return word >> BITS[kind] * place & (1 << BITS[kind]) - 1


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("K", [16, 96, 320])
def test_every_value_lies_where_the_layout_says(kind, K):
    values = torch.randint(0, 1 << BITS[kind], (3, K), dtype=torch.uint8)
    words = pack(values, kind)
    assert words.dtype == torch.int32
    assert [[field(words, kind, n, k) for k in range(K)] for n in range(3)] == values.tolist()
    assert torch.equal(unpack(words, kind, K), values)


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("zeros, perm", [(False, False), (True, True)])
def test_dequantized_weights_follow_the_formula(kind, zeros, perm):
    N, K = 5, 80
    if kind == "fp8":
        zeros = False
    weight = random_weight(kind, N, K, zeros=zeros, perm=perm)
    q, expected = weight.values().float(), torch.empty(N, K)
    middle = 2 ** (BITS[kind] - 1) if kind in FIELDS else 0
    for n in range(N):
        for k in range(K):
            zero = weight.zeros[k // 32, n] if zeros else middle
            feature = weight.perm[k] if perm else k
            expected[n, feature] = weight.scales[k // 32, n] * (q[n, k] - zero)
    assert torch.equal(weight.dequantize(), expected)
    x = torch.randn(4, K)
    torch.testing.assert_close(fused.linear(x, weight), x @ expected.T)


def test_blocks_may_end_anywhere():
    weight = random_weight("fp8", 70, 100, block=(64, 48))
    scales = torch.empty(70, 100)
    for n in range(70):
        for k in range(100):
            scales[n, k] = weight.scales[k // 48, n // 64]
    assert torch.equal(weight.dequantize(), weight.data.float() * scales)


@pytest.mark.parametrize("kind, block", [("int4", (1, 32)), ("int8", (1, 64)), ("fp8", (16, 32)), ("fp8", (1, 64))])
def test_joined_weights_come_apart_again(kind, block):
    parts = [random_weight(kind, N, 64, block=block, zeros=kind == "int4") for N in (32, 16, 48)]
    joint = cat(parts)
    assert torch.equal(joint.dequantize(), torch.cat([part.dequantize() for part in parts]))
    for part, view in zip(parts, joint.split([32, 16, 48])):
        assert torch.equal(view.dequantize(), part.dequantize())
        assert view.data.untyped_storage().data_ptr() == joint.data.untyped_storage().data_ptr()


def test_weights_with_one_scale_each_keep_it_when_joined():
    parts = [random_weight("fp8", N, 64, block=(rows, 64)) for N, rows in ((32, 32), (7, 7), (5, 1))]
    assert torch.equal(cat(parts).dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_weights_that_do_not_fit_are_not_joined():
    first = random_weight("int4", 16, 64, perm=True)
    cases = {
        "kind": random_weight("int2", 16, 64, perm=True),
        "in_features": random_weight("int4", 16, 96, perm=True),
        "perm": random_weight("int4", 16, 64, perm=True),
        "block": QuantizedWeight(
            kind="int4", in_features=64, data=first.data, scales=first.scales[:1], block=(1, 64), perm=first.perm
        ),
        "zeros": random_weight("int4", 16, 64, zeros=True),
    }
    channel, blocks = random_weight("fp8", 16, 64, block=(1, 64)), random_weight("fp8", 16, 64, block=(8, 64))
    assert why_not_joined([channel, blocks]) == why_not_joined([blocks, channel]) == "block differs"
    for name, second in cases.items():
        assert name in why_not_joined([first, second])
        with pytest.raises(ValueError, match=name):
            cat([first, second])
    ragged = [random_weight("fp8", 70, 64, block=(64, 32)) for _ in range(2)]
    with pytest.raises(ValueError, match="blocks of 64 rows"):
        cat(ragged)
    with pytest.raises(ValueError, match="split blocks"):
        ragged[0].narrow(3, 20)


@pytest.mark.parametrize("activations", ["int8", "fp8"])
@pytest.mark.parametrize("static", [False, True])
def test_inputs_are_rounded_as_the_weight_says(activations, static):
    scale = torch.tensor([0.05]) if static else None
    weight = random_weight(activations, 8, 64, block=(1, 64), activations=activations, input_scale=scale)
    x = torch.randn(4, 64) * torch.tensor([0.1, 1.0, 5.0, 100.0])[:, None]
    limit = 127 if activations == "int8" else 448
    step = scale if static else x.abs().amax(1, keepdim=True) / limit
    q = (x / step).clamp(-limit, limit)
    q = q.round() if activations == "int8" else q.to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(fused.linear(x, weight, backend="reference"), (q * step) @ weight.dequantize().T)


@pytest.mark.parametrize("norm", [False, True])
def test_what_surrounds_the_product_is_done_around_it(norm):
    from hf_paged_kernels.norm import Norm

    weight = random_weight("int4", 48, 64, zeros=True, perm=True)
    x, bias, residual = torch.randn(3, 64), torch.randn(48), torch.randn(3, 24)
    before = Norm(torch.randn(64), 1e-6, 0.0, "weight_after") if norm else None
    options = dict(norm=before, activation="silu", residual=residual)
    expected = fused.linear(x, weight.dequantize(), bias, **options)
    torch.testing.assert_close(fused.linear(x, weight, bias, **options), expected)


def test_experts():
    weight = random_weight("int4", 8, 64, experts=3, zeros=True)
    x, experts = torch.randn(4, 64), torch.tensor([0, 2, 1, 1, 2, 0, 0, 1])
    expected = torch.stack([x[i // 2] @ weight.dequantize()[experts[i]].T for i in range(8)])
    torch.testing.assert_close(fused.grouped_linear(x, weight, experts), expected)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("kind", dict(kind="int5")),
        ("activations", dict(activations="int4")),
        ("data", dict(data=torch.zeros(8, 5, dtype=torch.int32))),
        ("data", dict(data=torch.zeros(8, 16))),
        ("block", dict(block=(2, 32))),
        ("scales", dict(scales=torch.rand(3, 8))),
        ("scales", dict(scales=torch.ones(2, 8, dtype=torch.int32))),
        ("zeros", dict(zeros=torch.zeros(2, 8))),
        ("perm", dict(perm=torch.arange(63).int())),
        ("input_scale", dict(input_scale=torch.ones(1))),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, wrong):
    right = dict(kind="int4", in_features=64, block=(1, 32), scales=torch.rand(2, 8))
    right["data"] = torch.zeros(8, 16, dtype=torch.int32)
    QuantizedWeight(**right)
    with pytest.raises(ValueError, match=f"^{name}"):
        QuantizedWeight(**{**right, **wrong})
