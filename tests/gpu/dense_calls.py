"""Calls of the dense kernels on tensors of real shapes, for the compile gate."""

from __future__ import annotations

import numpy as np
import torch
from quantized_weights import unread_weight

from hf_paged_kernels import fused, lora
from hf_paged_kernels.norm import Norm

BF16 = torch.bfloat16


def rms_norm(*shape: int, **options) -> None:
    x = torch.empty(*shape, dtype=BF16)
    fused.rms_norm(x, torch.empty(shape[-1], dtype=BF16), 1e-6, **options, backend="triton")


def add_rms_norm(rows: int, size: int, **options) -> None:
    x = torch.empty(rows, size, dtype=BF16)
    fused.add_rms_norm(x, x, Norm(torch.empty(size, dtype=BF16), 1e-6), **options, backend="triton")


def layer_norm(rows: int, size: int) -> None:
    weight = torch.empty(size, dtype=BF16)
    fused.layer_norm(torch.empty(rows, size, dtype=BF16), weight, weight, 1e-5, backend="triton")


def act_and_mul(rows: int, size: int, activation: str, **options) -> None:
    fused.act_and_mul(torch.empty(rows, 2 * size, dtype=BF16), activation, **options, backend="triton")


def rotary(q_heads: int, k_heads: int, size: int, rotated: int) -> None:
    q, k = (torch.empty(8, heads, size, dtype=BF16) for heads in (q_heads, k_heads))
    angles = torch.empty(8, rotated, dtype=BF16)
    fused.rotary(q, k, angles, angles, backend="triton")


def linear(rows: int, N: int, K: int, *, norm=False, activation=None, residual=False, bias=False) -> None:
    x, weight = torch.empty(rows, K, dtype=BF16), torch.empty(N * (2 if activation else 1), K, dtype=BF16)
    fused.linear(
        x, weight, torch.empty(len(weight), dtype=BF16) if bias else None,
        norm=Norm(torch.empty(K, dtype=BF16), 1e-6) if norm else None, activation=activation,
        residual=torch.empty(rows, N, dtype=BF16) if residual else None, backend="triton",
    )  # fmt: skip


def exact_linear(rows: int, N: int, K: int, *, dtype=BF16, bias=False) -> None:
    x, weight = torch.empty(rows, K, dtype=dtype), torch.empty(N, K, dtype=dtype)
    fused.exact_linear(x, weight, torch.empty(N, dtype=dtype) if bias else None, backend="triton")


def mlp(rows: int, N: int, K: int, activation: str) -> None:
    linear(rows, N, K, norm=True, activation=activation)


def experts(tokens: int, top_k: int, num_experts: int, H: int, size: int, dtype=BF16, transposed=False) -> None:
    """A layer of experts; `transposed` is GPT-OSS's: weights along N, biases, no activation in the kernel."""
    x, pairs = torch.empty(tokens, H, dtype=dtype), torch.empty(tokens, top_k, dtype=torch.int64)
    gate_up, down = torch.empty(num_experts, 2 * size, H, dtype=dtype), torch.empty(num_experts, H, size, dtype=dtype)
    if transposed:
        weight, bias = gate_up.view(num_experts, H, 2 * size).mT, torch.empty(num_experts, 2 * size, dtype=dtype)
        fused.grouped_linear(x, weight, pairs.view(-1), bias, max_rows=tokens, backend="triton")
    else:
        router = torch.empty(tokens, top_k, dtype=dtype)
        fused.moe_experts(x, gate_up, down, pairs, router, activation="silu", backend="triton")


def quantized_linear(
    rows: int, kind: str, N: int, K: int, *, norm=False, activation=None, residual=False, dtype=BF16, **options
) -> None:
    """`options` of the weight: group, zeros, perm."""
    weight = unread_weight(kind, N * (2 if activation else 1), K, **options)
    fused.linear(
        torch.empty(rows, K, dtype=dtype), weight, norm=Norm(torch.empty(K, dtype=dtype), 1e-6) if norm else None,
        activation=activation, residual=torch.empty(rows, N, dtype=dtype) if residual else None, backend="triton",
    )  # fmt: skip


def quantized_experts(tokens: int, top_k: int, num_experts: int, kind: str, H: int, size: int, **options) -> None:
    """`options` of the weights: group, zeros."""
    gate_up = unread_weight(kind, num_experts, 2 * size, H, **options)
    down = unread_weight(kind, num_experts, H, size, **options)
    x, router = torch.empty(tokens, H, dtype=BF16), torch.empty(tokens, top_k, dtype=BF16)
    pairs = torch.zeros(tokens, top_k, dtype=torch.int64)
    fused.moe_experts(x, gate_up, down, pairs, router, activation="silu", backend="triton")


def adapters(rows: int, K: int, sizes: tuple[int, ...], rank: int, dtype: torch.dtype = BF16) -> None:
    """A layer's low-rank terms, for rows of two adapters."""
    site = lora.Site(sizes, torch.device("cpu"), dtype)
    for slot in range(2):
        terms = lora.Terms(torch.empty(rank, K, dtype=dtype), torch.empty(rank, max(sizes), dtype=dtype))
        site.put(slot, (terms,) * len(sizes))
    tiles = lora.tile_rows(np.arange(rows) % 2, torch.device("cpu"))
    x, y = torch.empty(rows, K, dtype=dtype), torch.empty(rows, sum(sizes), dtype=dtype)
    lora.add_terms_(y, x, tiles, site, backend="triton")
