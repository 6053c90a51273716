"""Between transformers' own caches and pages: contents of one as the other.

A DynamicCache holds keys and values [B, Hkv, L, D] a layer, rows padded on the left; sliding layers keep the columns that
the next token sees. Pages hold the same in blocks and without the padding, or what an adapter made of it
(`adapters.base.StockForm`).
"""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .adapters import StockForm
from .paged_cache import PagedCache

_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def why_not_stock(patch) -> str | None:
    """Why pages of a patched model hold something else than transformers' cache of it, or None if they hold the same."""
    layers = patch.adapter.layers
    stock = DynamicCache(config=patch.adapter.module.config.get_text_config(decoder=True)).layers
    if [spec.layer_idx for spec in layers] != list(range(len(stock) or len(layers))):
        return f"pages have {len(layers)} attention layers, transformers' cache {len(stock)} layers"
    return _why_misfit(stock, layers)


def _why_misfit(stock: list, layers: list) -> str | None:
    """Why layers of a stock cache keep other positions than pages of these layers."""
    for layer, spec in zip(stock, layers):
        if type(layer) not in _LAYERS:
            return f"a layer of it is a {type(layer).__name__}"
        kept, seen = getattr(layer, "sliding_window", None), spec.window or spec.chunk
        if kept != seen:
            return f"its layer {spec.layer_idx} keeps {kept or 'all'} positions, the pages {seen or 'all'}"
    return None


def why_not_paged(cache: Cache, patch, batch: int) -> str | None:
    """Why a cache that `generate` was given cannot be copied into pages and back, or None if it can."""
    if getattr(cache, "offloading", False) or type(cache) is not DynamicCache:
        return f"a {type(cache).__name__} cannot be copied into pages"
    layers = patch.adapter.layers
    stock = cache.layers or [DynamicLayer() for _ in layers]  # DynamicCache() gets its layers as they come
    reason = why_not_stock(patch) or _why_misfit(stock, layers)
    if reason or cache.get_seq_length() == 0:
        return reason
    if len(stock) != len(layers):
        return f"it has {len(stock)} layers, the pages {len(layers)}"
    for layer, spec in zip(stock, layers):
        if not _fits(layer, spec, patch.adaptations.form(spec.layer_idx), batch):
            return f"its layer {spec.layer_idx} holds keys of shape {list(layer.keys.shape)}"
    return None


def _fits(layer: DynamicLayer, spec, form: StockForm, batch: int) -> bool:
    """Whether a layer's keys and values have the sizes of the model's."""
    key, value = _last_tokens(layer, 0, 0)
    try:
        key, value = form.from_stock(key, value, torch.arange(0, device=key.device))
    except RuntimeError:  # torch's, of sizes that do not go together
        return False
    sizes = spec.num_kv_heads, spec.head_dim, spec.value_dim
    return len(layer.keys) == batch and (*key.shape[1:], value.shape[2]) == sizes


def to_pages(cache: Cache, pages: PagedCache, attention_mask: torch.Tensor | None) -> None:
    """Copy a stock cache into empty pages. Its columns are the first of `attention_mask` [B, W], which tells the padding."""
    batch, width = cache.layers[0].keys.shape[0], cache.get_seq_length()
    padding = [0] * batch
    if attention_mask is not None:
        padding = (attention_mask[:, :width] == 0).sum(-1).tolist()
    rows = pages.open(range(batch), publish=False)
    pages.width, pages.padding = width, padding
    lengths = [width - count for count in padding]
    adaptations = pages.engine.model.adaptations

    def source(spec, row: int):
        key, value = _last_tokens(cache.layers[spec.layer_idx], row, lengths[row])
        positions = torch.arange(lengths[row] - len(key), lengths[row], device=key.device)
        return adaptations.form(spec.layer_idx).from_stock(key, value, positions)

    rows.load(lengths, source)


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
    form = pages.engine.model.adaptations.form(spec.layer_idx)
    parts = [form.to_stock(*pages.rows.read(spec, row, columns)) for row in range(len(pages.padding))]
    keys, values = (_stack([part[side] for part in parts], columns).to(dtype) for side in (0, 1))
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def _last_tokens(layer: DynamicLayer, row: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [n, H, D] of a row's last tokens, as many as the layer has kept."""
    first = max(0, layer.keys.shape[-2] - num_tokens)
    return layer.keys[row, :, first:].transpose(0, 1), layer.values[row, :, first:].transpose(0, 1)


def _stack(parts: list[torch.Tensor], columns: int) -> torch.Tensor:
    """[n, H, D] per row, n at most `columns` -> [B, H, columns, D], rows aligned at their ends, zeros before."""
    result = parts[0].new_zeros(len(parts), columns, *parts[0].shape[1:])
    for row, part in enumerate(parts):
        if len(part):
            result[row, columns - len(part) :] = part
    return result.transpose(1, 2)
