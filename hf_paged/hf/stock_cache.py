"""Between transformers' own caches and pages: contents of one as the other.

A DynamicCache holds keys and values [B, Hkv, L, D] a layer, rows padded on the left; sliding layers keep the columns that
the next token sees. Pages hold the same for most models, in blocks and without the padding.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .adapters import LATENT
from .paged_cache import PagedCache

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def why_not_stock(patch) -> str | None:
    """Why pages of a patched model hold something else than transformers' cache of it, or None if they hold the same."""
    layers = patch.adapter.layers
    if LATENT in patch.adaptations.kinds.values():
        return "pages hold latents"
    stock = DynamicCache(config=patch.adapter.module.config.get_text_config(decoder=True)).layers
    if [spec.layer_idx for spec in layers] != list(range(len(stock) or len(layers))):
        return f"pages have {len(layers)} attention layers, transformers' cache {len(stock)} layers"
    other = next((layer for layer in stock if type(layer) not in _LAYERS), None)
    return None if other is None else f"a layer of it is a {type(other).__name__}"


def why_not_paged(cache: Cache, patch, batch: int) -> str | None:
    """Why a cache that `generate` was given cannot be copied into pages and back, or None if it can."""
    if getattr(cache, "offloading", False) or type(cache) is not DynamicCache:
        return f"a {type(cache).__name__} cannot be copied into pages"
    reason = why_not_stock(patch)
    if reason or cache.get_seq_length() == 0:
        return reason
    layers = patch.adapter.layers
    if len(cache.layers) != len(layers):
        return f"it has {len(cache.layers)} layers, the pages {len(layers)}"
    for layer, spec in zip(cache.layers, layers):
        if type(layer) not in _LAYERS:
            return f"a layer of it is a {type(layer).__name__}"
        shape = (*layer.keys.shape[:2], layer.keys.shape[-1], layer.values.shape[-1])
        if shape != (batch, spec.num_kv_heads, spec.head_dim, spec.value_dim):
            return f"its layer {spec.layer_idx} holds keys of shape {list(layer.keys.shape)}"
        if type(layer) is DynamicSlidingWindowLayer and layer.sliding_window not in (spec.window, spec.chunk):
            return f"its layer {spec.layer_idx} has a window of {layer.sliding_window}, the model's {spec.window}"
    return None


def to_pages(cache: Cache, pages: PagedCache, attention_mask: torch.Tensor | None) -> None:
    """Copy a stock cache into empty pages. Its columns are the first of `attention_mask` [B, W], which tells the padding."""
    batch, width = cache.layers[0].keys.shape[0], cache.get_seq_length()
    padding = [0] * batch
    if attention_mask is not None:
        padding = (attention_mask[:, :width] == 0).sum(-1).tolist()
    rows = pages.open(batch, publish=False)
    pages.width, pages.padding = width, padding
    lengths = [width - count for count in padding]
    rows.load(lengths, lambda spec, row: _row_of(cache.layers[spec.layer_idx], row, lengths[row]))


def to_stock(pages: PagedCache, into: Cache | None = None, *, whole: bool = False) -> Cache:
    """The contents of pages as a DynamicCache, zeros where a row has padding.

    Args:
        into: a cache to replace the contents of.
        whole: sliding layers too get all columns, and record their past: the cache will be cropped.
    """
    model = pages.engine.model
    result = DynamicCache(config=model.module.config.get_text_config(decoder=True)) if into is None else into
    while len(result.layers) < len(model.layers):  # DynamicCache() gets its layers as they come
        result.layers.append(DynamicLayer())
    for layer, spec in zip(result.layers, model.layers):
        if whole and isinstance(layer, DynamicSlidingWindowLayer):
            layer.activate_past_recording()
        _fill(layer, spec, pages, model.dtype)
    return result


def _fill(layer: DynamicLayer, spec, pages: PagedCache, dtype: torch.dtype) -> None:
    columns = pages.width
    if isinstance(layer, DynamicSlidingWindowLayer):
        if not layer.record_past:
            columns = min(columns, layer.sliding_window - 1)
        layer.cumulative_length = pages.width
    parts = [pages.rows.read(spec, row, columns) for row in range(len(pages.padding))]
    keys, values = (_stack([part[side] for part in parts], columns).to(dtype) for side in (0, 1))
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def _row_of(layer: DynamicLayer, row: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [n, Hkv, D] of a row's tokens, as many of the last as the layer has kept."""
    first = max(0, layer.keys.shape[-2] - num_tokens)
    return layer.keys[row, :, first:].transpose(0, 1), layer.values[row, :, first:].transpose(0, 1)


def _stack(parts: list[torch.Tensor], columns: int) -> torch.Tensor:
    """[n, H, D] per row, n at most `columns` -> [B, H, columns, D], rows aligned at their ends, zeros before."""
    result = parts[0].new_zeros(len(parts), columns, *parts[0].shape[1:])
    for row, part in enumerate(parts):
        if len(part):
            result[row, columns - len(part) :] = part
    return result.transpose(1, 2)
