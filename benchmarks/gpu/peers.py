"""Other people's kernels for the same work, where they are installed. Nothing here is required.

Each function returns {name: run(i)}, whose results have our shapes, on contiguous copies of what it is given, or on
pages where the peer reads pages. A peer that is not installed, or that does not take the case, is absent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[int], object]
FA3 = "FlashAttention-3"
SDPA = "torch SDPA"
FLEX = "torch FlexAttention"
CUBLAS = "torch linear"
GEMLITE = "gemlite, int8 weights"


@cache
def flash_attention_3():
    """Its Python module (built from source, or the wheel fa3-fwd), or None; it runs on Hopper only."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return None
    for name in ("flash_attn_interface", "fa3_fwd_interface"):
        if find_spec(name) is not None:
            return import_module(name)
    return None


def decode(
    queries: Sequence[Tensor], k_pages: Tensor, v_pages: Tensor, tables: Sequence[Tensor], length: int
) -> dict[str, Run]:
    """Single tokens of sequences of one length.

    Args:
        queries: per input set, [B, Hq, D].
        k_pages, v_pages: the cache as [N, Hkv, block, D].
        tables: per input set, int32 [B, blocks].
    """
    runs: dict[str, Run] = {}
    module, dtype = flash_attention_3(), queries[0].dtype
    if module is not None and k_pages.dtype == dtype:
        # FlashAttention-3 reads [N, block, Hkv, D]. The order in memory is its own: a copy of the same bytes.
        k_own, v_own = (pages.transpose(1, 2).contiguous() for pages in (k_pages, v_pages))
        lengths = torch.full((len(queries[0]),), length, dtype=torch.int32, device=queries[0].device)
        runs[FA3] = lambda i: _first(
            module.flash_attn_with_kvcache(
                queries[i][:, None], k_own, v_own, cache_seqlens=lengths, page_table=tables[i], causal=True
            )
        )[:, 0]
    if k_pages.dtype == dtype:
        keys, values = zip(*(_contiguous(k_pages, v_pages, table, length) for table in tables), strict=True)
        runs[SDPA] = lambda i: F.scaled_dot_product_attention(
            queries[i][:, :, None], keys[i], values[i], enable_gqa=True
        )[:, :, 0]
    return runs


def prefill(
    queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], flex: bool = False
) -> dict[str, Run]:
    """One whole prompt, causal. Per input set: query [n, Hq, D], key and value [n, Hkv, D]."""
    q, k, v = ([tensor.transpose(0, 1)[None].contiguous() for tensor in part] for part in (queries, keys, values))
    runs: dict[str, Run] = {
        SDPA: lambda i: _rows(F.scaled_dot_product_attention(q[i], k[i], v[i], is_causal=True, enable_gqa=True))
    }
    module = flash_attention_3()
    if module is not None:
        runs[FA3] = lambda i: _first(
            module.flash_attn_func(queries[i][None], keys[i][None], values[i][None], causal=True)
        )[0]
    if flex and q[0].device.type == "cuda":
        attend, mask = _flex(q[0].shape[2], q[0].device)
        runs[FLEX] = lambda i: _rows(attend(q[i], k[i], v[i], block_mask=mask, enable_gqa=True))
    return runs


def linear(inputs: Sequence[Tensor], weights: Sequence[Tensor], gemlite: bool = False) -> dict[str, Run]:
    """x [M, K] @ weight [N, K].T."""
    runs: dict[str, Run] = {CUBLAS: lambda i: F.linear(inputs[i], weights[i])}
    if gemlite and inputs[0].device.type == "cuda" and find_spec("gemlite") is not None:
        helper = import_module("gemlite.helper").A16W8(device=str(inputs[0].device))
        layers = [helper.from_weights(weight) for weight in weights]
        runs[GEMLITE] = lambda i: layers[i](inputs[i])
    return runs


def _rows(out: Tensor) -> Tensor:
    """[1, H, n, D] -> [n, H, D]"""
    return out[0].transpose(0, 1)


def _first(result: Tensor | tuple) -> Tensor:
    """Some versions of FlashAttention-3 return the logarithms of the sums as well."""
    return result[0] if isinstance(result, tuple) else result


def _contiguous(k_pages: Tensor, v_pages: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, L, D] of the sequences of a table."""
    return tuple(
        pages[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous() for pages in (k_pages, v_pages)
    )


def _flex(length: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(batch, head, query, key):
        return query >= key

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(flex_attention), create_block_mask(causal, None, None, length, length, device=device)
