"""Calls of the kernels for fp8 weights, and int8 ones with int8 inputs, of real shapes, for the compile gate."""

from __future__ import annotations

import torch
from quantized_weights import unread_weight

from hf_paged_kernels import fused
from hf_paged_kernels.norm import Norm
from hf_paged_kernels.quantized import QuantizedWeight

BF16 = torch.bfloat16


def weight(*shape: int, kind="fp8", activations: str | None = "fp8", block=None, static=False) -> QuantizedWeight:
    """One scale a row, unless `block` says otherwise."""
    rows, columns = block or (1, shape[-1])
    return unread_weight(kind, *shape, group=columns, rows=rows, activations=activations, static=static)


def linear(rows: int, N: int, K: int, *, norm=False, activation=None, residual=False, bias=False, **of_weight) -> None:
    size = N * (2 if activation else 1)
    fused.linear(
        torch.empty(rows, K, dtype=BF16), weight(size, K, **of_weight), torch.empty(size, dtype=BF16) if bias else None,
        norm=Norm(torch.empty(K, dtype=BF16), 1e-6) if norm else None, activation=activation,
        residual=torch.empty(rows, N, dtype=BF16) if residual else None, backend="triton",
    )  # fmt: skip


def mlp(rows: int, N: int, K: int, **of_weight) -> None:
    linear(rows, N, K, norm=True, activation="silu", **of_weight)


def experts(tokens: int, top_k: int, num_experts: int, H: int, size: int, **of_weight) -> None:
    x, chosen = torch.empty(tokens, H, dtype=BF16), torch.zeros(tokens, top_k, dtype=torch.int64)
    gate_up, down = weight(num_experts, 2 * size, H, **of_weight), weight(num_experts, H, size, **of_weight)
    router = torch.empty(tokens, top_k, dtype=BF16)
    fused.moe_experts(x, gate_up, down, chosen, router, activation="silu", backend="triton")
