"""Norms of heads, rotary embedding and the KV write: the separate operations, one after another."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..norm import Norm
from . import attention, elementwise


def one_after_another(rms_norm: Callable, rotary: Callable, store_kv: Callable) -> Callable:
    """`ops.rotary_store` made of a backend's separate operations."""

    def rotary_store(
        query, key, value, k_cache, v_cache, slot_mapping, cos, sin, *, q_norm: Norm | None = None,
        k_norm: Norm | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `ops.rotary_store`."""
        if q_norm is not None:
            query = rms_norm(query, q_norm.weight, q_norm.eps, offset=q_norm.offset, cast=q_norm.cast)
        if k_norm is not None:
            key = rms_norm(key, k_norm.weight, k_norm.eps, offset=k_norm.offset, cast=k_norm.cast)
        if cos is not None:
            query, key = rotary(query, key, cos, sin)
        store_kv(key, value, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
        return query.contiguous()

    return rotary_store


rotary_store = one_after_another(elementwise.rms_norm, elementwise.rotary, attention.store_kv)
