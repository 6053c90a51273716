"""Norms of heads, rotary embedding and the KV write on the CPU: the separate kernels, one after another."""

from __future__ import annotations

from ..ref.rotary_store import one_after_another
from . import attention, elementwise

rotary_store = one_after_another(elementwise.rms_norm, elementwise.rotary, attention.store_kv)
