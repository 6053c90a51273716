"""Checks of arguments: every error names the argument that is wrong. Shapes are those of `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import CASTS, Norm

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED_DTYPES = (torch.float8_e4m3fn, torch.int8)
TRITON_MAX_HEAD_DIM = 512  # latents may be longer


def check_attention(query, key, value, k_cache, v_cache, metadata, window, chunk, softcap, sinks, alibi_slopes):
    check_cache(k_cache, v_cache)
    num_tokens, num_heads, k_head_dim = shape3("query", query)
    num_kv_heads = v_cache.shape[1]
    if query.dtype not in FLOAT_DTYPES:
        raise ValueError(f"query has dtype {query.dtype}, not one of {FLOAT_DTYPES}")
    if query.device != k_cache.device:
        raise ValueError(f"query is on {query.device} and k_cache on {k_cache.device}")
    if k_head_dim != k_cache.shape[2]:
        raise ValueError(f"query has head size {k_head_dim} and k_cache {k_cache.shape[2]}")
    if num_heads % num_kv_heads:
        raise ValueError(f"query has {num_heads} heads, not a multiple of the {num_kv_heads} of k_cache")
    if metadata.slot_mapping.shape[0] != num_tokens:
        raise ValueError(f"metadata.slot_mapping has {metadata.slot_mapping.shape[0]} entries, query {num_tokens} rows")
    if (key is None) != (value is None):
        raise ValueError("key and value must both be given or both be None")
    if key is not None:
        check_new_kv(key, value, k_cache, v_cache)
        if key.shape[0] != num_tokens:
            raise ValueError(f"key has {key.shape[0]} rows and query {num_tokens}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    if chunk is not None and (chunk < 1 or window is not None):
        raise ValueError(f"chunk must be at least 1 and without a window, not {chunk} with window {window}")
    if alibi_slopes is not None and metadata.ends is not None:
        raise ValueError("alibi_slopes must be None where rows see beyond themselves (metadata.ends)")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    for name, per_head in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if per_head is not None and tuple(per_head.shape) != (num_heads,):
            raise ValueError(f"{name} has shape {list(per_head.shape)}, not [{num_heads}]")


def check_results(query, v_head_dim: int, out: Tensor | None, lse: Tensor | None, split_size: int | None) -> None:
    num_tokens, num_heads, _ = query.shape
    if out is not None:
        if tuple(out.shape) != (num_tokens, num_heads, v_head_dim) or not out.is_contiguous():
            raise ValueError(f"out must be contiguous [{num_tokens}, {num_heads}, {v_head_dim}]")
        if out.dtype not in (query.dtype, torch.float32):
            raise ValueError(f"out has dtype {out.dtype} and query {query.dtype}")
    check_lse(lse, num_tokens, num_heads)
    if split_size is not None and split_size < 1:
        raise ValueError(f"split_size must be at least 1, not {split_size}")


def check_lse(lse: Tensor | None, num_tokens: int, num_heads: int) -> None:
    if lse is None:
        return
    if tuple(lse.shape) != (num_tokens, num_heads) or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(f"lse must be contiguous float32 [{num_tokens}, {num_heads}], not {lse.dtype} "
                         f"{list(lse.shape)}")  # fmt: skip


def check_parts(parts, part_lses, sinks: Tensor | None, out: Tensor | None, lse: Tensor | None) -> None:
    if parts.dim() != 4 or not len(parts) or parts.dtype not in FLOAT_DTYPES or not parts[0].is_contiguous():
        raise ValueError(f"parts must be floats [P, T, H, D], each part contiguous, not {parts.dtype} "
                         f"{list(parts.shape)} strided {parts.stride()}")  # fmt: skip
    right = part_lses.shape == parts.shape[:3] and part_lses.dtype == torch.float32
    if not right or not part_lses[0].is_contiguous():
        raise ValueError(f"part_lses must be float32 {list(parts.shape[:3])}, each part contiguous, not "
                         f"{part_lses.dtype} {list(part_lses.shape)} strided {part_lses.stride()}")  # fmt: skip
    if sinks is not None and sinks.shape != parts.shape[2:3]:
        raise ValueError(f"sinks has shape {list(sinks.shape)}, not [{parts.shape[2]}]")
    if out.shape != parts.shape[1:] or out.dtype not in FLOAT_DTYPES or not out.is_contiguous():
        raise ValueError(f"out must be contiguous floats {list(parts.shape[1:])}, not {out.dtype} {list(out.shape)}")
    check_lse(lse, *parts.shape[1:3])


def check_cache(k_cache: Tensor, v_cache: Tensor) -> None:
    k_shape, v_shape = k_cache.shape, v_cache.shape
    if len(k_shape) != 4:
        raise ValueError(f"k_cache must be [num_blocks, Hkv, Dk, block_size], not {list(k_shape)}")
    if len(v_shape) != 4:
        raise ValueError(f"v_cache must be [num_blocks, Hkv, block_size, Dv], not {list(v_shape)}")
    if k_shape[0] != v_shape[0] or k_shape[1] != v_shape[1] or k_shape[3] != v_shape[2]:
        raise ValueError(f"v_cache {list(v_shape)} does not fit k_cache {list(k_shape)}")
    if k_shape[3] % 16:
        raise ValueError(f"k_cache has block size {k_shape[3]}, not a multiple of 16")
    known = FLOAT_DTYPES + QUANTIZED_DTYPES
    if k_cache.dtype not in known or v_cache.dtype != k_cache.dtype:
        raise ValueError(f"k_cache and v_cache have dtypes {k_cache.dtype}, {v_cache.dtype}: one of {known}")


def values_lie_in_keys(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether v_cache is a view of the first Dv dimensions in k_cache (see `ops.allocate_kv`)."""
    return k_cache.data_ptr() == v_cache.data_ptr()


def check_cache_sizes(block_size: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
    if block_size < 16 or block_size % 16:
        raise ValueError(f"block_size must be a multiple of 16, not {block_size}")


def check_scales(k_scale: Tensor | None, v_scale: Tensor | None, k_cache: Tensor) -> None:
    if k_scale is None and v_scale is None:
        if k_cache.dtype in QUANTIZED_DTYPES:
            raise ValueError(f"k_cache is {k_cache.dtype}: k_scale and v_scale must be given")
        return
    if k_cache.dtype not in QUANTIZED_DTYPES:
        raise ValueError(f"k_scale and v_scale must be None for a cache of {k_cache.dtype}")
    shape = (*k_cache.shape[:2], k_cache.shape[3])
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None or scale.dtype != torch.float32 or tuple(scale.shape) != shape or scale.stride(2) != 1:
            given = "None" if scale is None else f"{scale.dtype} {list(scale.shape)} strided {scale.stride()}"
            raise ValueError(f"{name} must be float32 {list(shape)}, contiguous in its last dimension, not {given}")
    if k_scale.stride() != v_scale.stride():
        raise ValueError(f"k_scale and v_scale must have the same strides, not {k_scale.stride()} {v_scale.stride()}")


def check_new_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    key_shape, value_shape = shape3("key", key), shape3("value", value)
    if key_shape[1:] != k_cache.shape[1:3]:
        raise ValueError(f"key has shape {list(key_shape)}, k_cache holds {list(k_cache.shape[1:3])} a token")
    if value_shape[1] != v_cache.shape[1] or value_shape[2] != v_cache.shape[3]:
        raise ValueError(f"value has shape {list(value_shape)}, v_cache holds {list(v_cache.shape[1::2])} a token")
    if value_shape[0] != key_shape[0]:
        raise ValueError(f"value has {value_shape[0]} rows and key {key_shape[0]}")
    if key.dtype not in FLOAT_DTYPES or value.dtype != key.dtype:
        raise ValueError(f"key and value have dtypes {key.dtype}, {value.dtype}: both must be one of {FLOAT_DTYPES}")


def check_rotary(cos: Tensor | None, sin: Tensor | None, query: Tensor) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError("cos and sin must both be given or both be None")
    num_tokens, dim = query.shape[0], query.shape[2]
    for name, tensor in (("cos", cos), ("sin", sin)):
        shape = tuple(tensor.shape)
        if len(shape) != 2 or shape[0] != num_tokens or shape[1] % 2 or not 0 < shape[1] <= dim:
            raise ValueError(f"{name} must be [{num_tokens}, R] with R even and at most {dim}, not {list(shape)}")
        if tensor.dtype != query.dtype or tensor.stride(1) != 1:
            raise ValueError(f"{name} must be {query.dtype} like query and contiguous in its last dimension, not "
                             f"{tensor.dtype} strided {tensor.stride()}")  # fmt: skip
    if cos.shape != sin.shape:
        raise ValueError(f"cos has shape {list(cos.shape)} and sin {list(sin.shape)}")


def check_norm(name: str, norm: Norm | None, query: Tensor) -> None:
    if norm is None:
        return
    if norm.cast not in CASTS:
        raise ValueError(f"{name}.cast {norm.cast!r} is not one of {CASTS}")
    weight, dim = norm.weight, query.shape[2]
    if weight is not None and (weight.shape != (dim,) or weight.dtype != query.dtype or not weight.is_contiguous()):
        raise ValueError(f"{name}.weight must be contiguous {query.dtype} [{dim}], not {weight.dtype} "
                         f"{list(weight.shape)}")  # fmt: skip


def shape3(name: str, tensor: Tensor) -> torch.Size:
    if tensor.dim() != 3:
        raise ValueError(f"{name} must be [tokens, heads, head size], not {list(tensor.shape)}")
    return tensor.shape


def check_index(name: str, tensor: Tensor, dtype: torch.dtype, dim: int) -> None:
    if tensor.dtype != dtype or tensor.dim() != dim or not tensor.is_contiguous():
        raise ValueError(f"{name} must be a contiguous {dtype} tensor of {dim} dimensions, not {tensor.dtype} "
                         f"{list(tensor.shape)}")  # fmt: skip
