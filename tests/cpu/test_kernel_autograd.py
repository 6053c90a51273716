"""Gradients of the kernels of exact mode against autograd on the same formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_paged_kernels import autograd, fused, ops
from hf_paged_kernels.metadata import AttentionMetadata
from hf_paged_kernels.norm import Norm
from hf_paged_kernels.ref import elementwise

BLOCK = 16


def agree(actual, expected, inputs, wide, tolerance=1e-5):
    """Both results, and what arbitrary gradients of them are to the inputs, [float32 or bfloat16] against float64."""
    generator = torch.Generator().manual_seed(1)
    actual, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (actual, expected))
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in expected]
    gradients = torch.autograd.grad(actual, inputs, [w.to(x.dtype) for w, x in zip(weights, actual)])
    truth = torch.autograd.grad(expected, wide, weights)
    for mine, own in zip([*actual, *gradients], [*expected, *truth], strict=True):
        assert mine.shape == own.shape
        assert (mine.double() - own).abs().max() <= tolerance * own.abs().max()


def leaves(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    narrow = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return narrow, [tensor.detach().double().requires_grad_() for tensor in narrow]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype, tolerance, bias):
    inputs, wide = leaves((2, 5, 48), (40, 48), *[(40,)] * bias, dtype=dtype)
    agree(fused.exact_linear(*inputs, backend="cpu"), F.linear(*wide), inputs, wide, tolerance)


def test_head_linear():
    inputs, wide = leaves((3, 5, 16), (3, 16, 20), (20,))
    agree(fused.head_linear(*inputs), wide[0] @ wide[1] + wide[2], inputs, wide)


@pytest.mark.parametrize("offset, cast", [(0.0, "weight_after"), (1.0, "weight_before")])
def test_norms(offset, cast):
    inputs, wide = leaves((6, 32), (6, 32), (32,))
    (x, residual, weight), (X, R, W) = inputs, wide

    def normed(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (offset + weight)

    options = dict(offset=offset, cast=cast)
    agree(fused.rms_norm(x, weight, 1e-5, **options), normed(X, W), [x, weight], [X, W])
    both = fused.add_rms_norm(x, residual, Norm(weight, 1e-5, **options))
    agree(both, (normed(X + R, W), X + R), inputs, wide)


@pytest.mark.parametrize("activation, function", [("silu", F.silu), ("gelu", F.gelu)])
def test_act_and_mul(activation, function):
    inputs, wide = leaves((7, 64))
    gate, up = wide[0].chunk(2, -1)
    agree(fused.act_and_mul(inputs[0], activation), function(gate) * up, inputs, wide)


def test_rotary_of_frozen_tables():
    inputs, wide = leaves((5, 4, 16), (5, 2, 16))
    tables = torch.randn(2, 5, 8)
    agree(fused.rotary(*inputs, *tables), elementwise.rotary(*wide, *tables.double()), inputs, wide)


def test_one_weight_of_several_sends_each_its_own_gradient():
    whole = torch.randn(10, 8)
    parts = [part.requires_grad_(trained) for part, trained in zip(whole.detach().split([4, 6]), (True, False))]
    x = torch.randn(3, 8)
    F.linear(x, autograd.joined(whole, parts)).sum().backward()
    torch.testing.assert_close(parts[0].grad, x.sum(0).expand(4, 8))
    assert parts[1].grad is None
    result = F.linear(x, autograd.joined(whole, parts)).sum()
    with torch.no_grad():
        parts[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_gradients_of_gradients_are_refused():
    (x, weight), _ = leaves((3, 8), (4, 8))
    (gradient,) = torch.autograd.grad(fused.exact_linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# -- attention: two prompts, of which the second goes on from the first's first block


def two_sequences():
    first, second = 21, 30
    tables = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    own = torch.arange(BLOCK, second)
    slots = torch.cat([torch.arange(first), tables[1].long()[own // BLOCK] * BLOCK + own % BLOCK])
    metadata = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, first, first + len(own)], dtype=torch.int32),
        seq_lens=torch.tensor([first, second], dtype=torch.int32),
        block_table=tables, slot_mapping=slots, max_seqlen_q=first, max_seqlen_k=second,
    )  # fmt: skip
    rows = [torch.arange(first), torch.cat([torch.arange(BLOCK), torch.arange(first, len(slots))])]
    return metadata, rows, [torch.arange(first), torch.arange(first, len(slots))]


def dense(query, key, value, sinks, rows, own, *, scale, window=None, chunk=None, softcap=None, alibi_slopes=None):
    """`ops.attention_` on whole sequences, in the dtype of its arguments."""
    out = []
    for mine, queries in zip(rows, own):
        k, v = (x[mine].repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(0, 1) for x in (key, value))
        j = torch.arange(len(mine))
        p = j[-len(queries) :, None]
        scores = query[queries].transpose(0, 1) @ k.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores + alibi_slopes[:, None, None] * (j - p)
        seen = j <= p
        if window is not None:
            seen = seen & (j > p - window)
        if chunk is not None:
            seen = seen & (j >= p - p % chunk)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(queries), 1)], -1)
        out.append((scores.softmax(-1)[..., : len(j)] @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("longest", [4 * 2**20, 5 * 4 * 30])
@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(window=7), dict(chunk=8), dict(softcap=2.0), dict(sinks=True), dict(alibi_slopes=True),
        dict(window=7, softcap=2.0, sinks=True),
    ],
    ids=str,
)  # fmt: skip
def test_attention(options, longest, monkeypatch):
    monkeypatch.setattr(autograd, "_MAX_SCORES", longest)  # many runs of queries
    metadata, rows, own = two_sequences()
    tokens = len(metadata.slot_mapping)
    has_sinks = options.pop("sinks", False) if (options := dict(options)) else False
    inputs, wide = leaves((tokens, 4, 16), (tokens, 2, 16), (tokens, 2, 8), *[(4,)] * has_sinks)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if options.pop("alibi_slopes", False) else None
    options |= dict(scale=0.3)
    caches = ops.allocate_kv(3, 2, 16, 8, BLOCK, torch.float32, "cpu")

    def kernel(query, key, value, sinks):
        return ops.attention_(query, key, value, *caches, metadata, sinks=sinks, alibi_slopes=slopes, **options)

    sinks = [] if has_sinks else [None]
    common = dict(block_size=BLOCK, alibi_slopes=slopes, **{"window": None, "chunk": None, "softcap": None, **options})
    actual = autograd.attention(kernel, *inputs, *sinks, metadata, **common)
    expected = dense(*wide, *sinks, rows, own, alibi_slopes=None if slopes is None else slopes.double(), **options)
    agree(actual, expected, inputs, wide)
