"""Gradients of kernels: the values are the kernel's, the gradient is that of the same formula in ordinary torch.

A forward that trains runs the kernels that give a row bits of its own; nothing of the kind is asked of its gradient, which
goes through torch's own products of matrices. What a kernel passes over on the way is computed again when the gradient is
wanted, so that no more is kept than the inputs. Gradients of gradients are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .metadata import AttentionMetadata

_MAX_SCORES = 4 * 2**20  # floats of one matrix of scores: long prompts are cut into runs of queries


def wanted(*tensors) -> bool:
    """Whether what is made of these (tensors, None or quantized weights) must know its gradient."""
    return torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel: Callable, formula: Callable, *tensors: Tensor | None):
        ctx.formula = formula
        ctx.save_for_backward(*tensors)
        return kernel(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        needed = ctx.needs_input_grad[2:]
        inputs = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed)
        ]
        with torch.enable_grad(), _no_autocast(gradients[0]):
            outputs = ctx.formula(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        reached = [(output, grad) for output, grad in zip(outputs, gradients) if output.requires_grad]
        results = torch.autograd.grad(
            [output for output, _ in reached],
            [tensor for tensor, need in zip(inputs, needed) if need],
            [grad for _, grad in reached],
            allow_unused=True,
        )
        results = iter(results)
        return None, None, *(next(results) if need else None for need in needed)


def recomputed(kernel: Callable, formula: Callable, *tensors: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """`kernel(*tensors)`, differentiated as `formula(*tensors)`, which is cheap: it runs again for the gradient."""
    return _Recomputed.apply(kernel, formula, *tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel: Callable, x: Tensor, weight: Tensor, bias: Tensor | None):
        ctx.save_for_backward(x, weight)
        return kernel(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        _, for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, weight.shape[0])
        with _no_autocast(gradient):
            return (
                None,
                (rows @ weight).view(x.shape) if for_x else None,
                rows.mT @ x.reshape(-1, weight.shape[1]) if for_weight else None,
                rows.sum(0) if for_bias else None,
            )


def linear(kernel: Callable, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`kernel(x, weight, bias)`, differentiated as x [..., K] @ weight [N, K].T + bias [N]."""
    return _Linear.apply(kernel, x, weight, bias)


class _HeadLinear(_Linear):
    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        _, for_x, for_weight, for_bias = ctx.needs_input_grad
        with _no_autocast(gradient):
            return (
                None,
                gradient @ weight.mT if for_x else None,
                x.mT @ gradient if for_weight else None,
                gradient.sum((0, 1)) if for_bias else None,
            )


def head_linear(kernel: Callable, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`kernel(x, weight, bias)`, differentiated as x [H, M, K] @ weight [H, K, N] + bias [N]."""
    return _HeadLinear.apply(kernel, x, weight, bias)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole: Tensor, *parts: Tensor):
        ctx.sizes = [len(part) for part in parts]
        ctx.save_for_backward(*parts)
        return whole.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        _ = ctx.saved_tensors  # raises if a part was written to since: the whole does not know of it
        split = gradient.split(ctx.sizes)
        return None, *(part if need else None for part, need in zip(split, ctx.needs_input_grad[1:]))


def joined(whole: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """`whole`, of which `parts` are views that lie in it one after another, as made of them."""
    return _Joined.apply(whole, *parts)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, metadata, block_size, options, query, key, value, sinks):
        out = kernel(query, key, value, sinks)
        ctx.batch, ctx.block_size, ctx.options = metadata, block_size, options
        ctx.save_for_backward(query, key, value, sinks, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        query, key, value, sinks, out = ctx.saved_tensors
        metadata = ctx.batch
        d_query = torch.empty(query.shape, dtype=torch.float32, device=query.device)
        d_key, d_value = (torch.zeros(tensor.shape, dtype=torch.float32, device=query.device) for tensor in (key, value))
        d_sinks = None if sinks is None else torch.zeros(sinks.shape, dtype=torch.float32, device=query.device)
        starts, seq_lens = metadata.cu_seqlens_q.tolist(), metadata.seq_lens.tolist()
        for seq, rows in enumerate(_rows_of(metadata, ctx.block_size)):
            begin, end = starts[seq], starts[seq + 1]
            keys, values = key[rows].float(), value[rows].float()
            sums = torch.zeros_like(keys), torch.zeros_like(values)
            longest = max(1, _MAX_SCORES // (query.shape[1] * seq_lens[seq]))
            for first in range(begin, end, longest):
                last = min(end, first + longest)
                position = seq_lens[seq] - (end - first)
                d_query[first:last] = _backward_of_run(
                    query[first:last].float(), keys, values, sinks, out[first:last].float(), gradient[first:last].float(),
                    position, *sums, d_sinks, **ctx.options,
                )  # fmt: skip
            d_key.index_add_(0, rows, sums[0])
            d_value.index_add_(0, rows, sums[1])
        d_sinks = None if sinks is None else d_sinks.to(sinks.dtype)
        return None, None, None, None, d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), d_sinks


def attention(
    kernel: Callable, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, metadata: AttentionMetadata,
    *, block_size: int, **options,
) -> Tensor:  # fmt: skip
    """`kernel(query, key, value, sinks)`, differentiated as the formula of `ops.attention_` with these `options`.

    Sequences may share blocks. Every key and value that the call reads must be one of its own; a quantized cache is
    differentiated as if it were not.
    """
    return _Attention.apply(kernel, metadata, block_size, options, query, key, value, sinks)


def _rows_of(metadata: AttentionMetadata, block_size: int) -> list[Tensor]:
    """Of every sequence the packed rows [L] of all its positions."""
    slots = metadata.slot_mapping
    row_of = slots.new_empty((int(metadata.block_table.max()) + 1) * block_size)
    row_of[slots] = torch.arange(len(slots), device=slots.device)
    row_of = row_of.view(-1, block_size)
    return [
        row_of[table[: -(-length // block_size)].long()].flatten()[:length]
        for table, length in zip(metadata.block_table, metadata.seq_lens.tolist())
    ]


def _backward_of_run(
    query, keys, values, sinks, out, gradient, position: int, d_keys, d_values, d_sinks,
    *, scale: float, window: int | None, chunk: int | None, softcap: float | None, alibi_slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient [n, Hq, Dk] of queries at `position` and on; those of keys [L, Hkv, Dk], values and sinks are added up.

    All float32. With P the weights and S the scores: dV = P^T dO, dS = P (dO V^T - dO.O), dQ = scale dS K,
    dK = scale dS^T Q (Dao et al., "FlashAttention", 2022).
    """
    num_rows, num_heads, dim = query.shape
    num_kv_heads, end = keys.shape[1], position + num_rows
    first = 0 if window is None else max(0, position - window + 1)
    if chunk is not None:
        first = position - position % chunk
    p = torch.arange(position, end, device=query.device)[:, None]
    j = torch.arange(first, end, device=query.device)
    hidden = j > p
    if window is not None:
        hidden |= j <= p - window
    if chunk is not None:
        hidden |= j < p - p % chunk

    def by_kv_head(tensor):  # [n, Hq, D] -> [Hkv, group * n, D]
        return tensor.transpose(0, 1).reshape(num_kv_heads, -1, tensor.shape[2])

    def by_head(tensor):  # [Hkv, group * n, L] -> [Hq, n, L]
        return tensor.view(num_heads, num_rows, -1)

    q, g = by_kv_head(query), by_kv_head(gradient)
    k, v = (tensor[first:end].transpose(0, 1) for tensor in (keys, values))
    scores = by_head(q @ k.mT).mul_(scale)
    if softcap is not None:
        scores = torch.tanh_(scores.div_(softcap))
        steep = 1 - scores.square()  # of the cap
        scores = scores.mul_(softcap)
    if alibi_slopes is not None:
        scores += alibi_slopes.float()[:, None, None] * (j - p)
    scores.masked_fill_(hidden, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.float()[:, None, None].expand(-1, num_rows, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)
        weights, at_sink = weights[..., :-1].contiguous(), weights[..., -1]
    d_values[first:end] += (weights.view(num_kv_heads, -1, len(j)).mT @ g).transpose(0, 1)
    along = (gradient * out).sum(-1).T  # [Hq, n]
    if sinks is not None:
        d_sinks -= (at_sink * along).sum(-1)
    d_scores = by_head(g @ v.mT).sub_(along[..., None]).mul_(weights)
    if softcap is not None:
        d_scores *= steep
    d_scores = d_scores.mul_(scale).view(num_kv_heads, -1, len(j))
    d_keys[first:end] += (d_scores.mT @ q).transpose(0, 1)
    return (d_scores @ k).view(num_heads, num_rows, dim).transpose(0, 1)


def _no_autocast(like: Tensor):
    return torch.autocast(like.device.type, enabled=False)
