"""The public signatures of the attention kernels: argument checks, then dispatch to a backend.

Letters in shapes: T tokens of the packed batch, S sequences, B blocks per table row, Hq query heads, Hkv key/value
heads (a divisor of Hq), Dk and Dv head sizes.

A layer's cache is two tensors:

    k_cache [num_blocks, Hkv, Dk, block_size]
    v_cache [num_blocks, Hkv, block_size, Dv]

On CPU both are contiguous: keys are dim-major, so that 16 scores at a time need no horizontal sum. For Triton a block's
keys lie in memory as [block_size, Dk], token by token, and k_cache is a view of that (see `allocate_kv`).

A cache may be quantized: float8_e4m3fn or int8, with a float32 scale for every key and every value of a head,

    k_scale, v_scale [num_blocks, Hkv, block_size]     x = scale * q, scale = max |x| / the type's largest number

which every function takes beside the cache.

Backends: "cpu" (C++, compiled on first use), "triton" (CUDA and ROCm; CPU tensors in Triton's interpreter) and
"reference" (plain torch, any device). "auto" takes the device's own if it can run, else the reference. All of them
promise the same: slots no query may see are never read into a result, whatever they hold.
The C++ backend promises more: a row's result has the same bits whatever else is in the batch, however its prompt was
cut into chunks, on any number of threads.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from . import checks
from .metadata import AttentionMetadata
from .norm import Norm
from .ref import attention as _reference

BACKENDS = ("auto", "cpu", "triton", "reference")
OWN_BACKEND = {"cpu": "cpu", "cuda": "triton"}  # device type -> what "auto" means there
_cpu = None  # the module of C++ launchers, once something needed it


def attention_(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    split_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Write this step's keys and values into the cache, then attend: prompt chunks and decodes in one call.

    Row i of a sequence is position p = seq_len - q_len + i and sees positions j up to its own, or all before its entry of
    `metadata.ends`: from p - window + 1 if there is a window, from p - p % chunk if there is a chunk, else from the first:

        s[j] = scale * q.k[j];  s = softcap * tanh(s / softcap);  s[j] += alibi_slope * (j - p)
        out  = sum_j exp(s[j]) v[j] / (sum_j exp(s[j]) + exp(sink))

    Every key and value of the call is written before anything is read, so a sequence may share blocks that another
    sequence of the same call fills. Scores and sums are float32 whatever the dtypes.

    Args:
        query: [T, Hq, Dk], any strides.
        key, value: [T, Hkv, Dk] and [T, Hkv, Dv], any strides; both None if the cache is already written.
        k_cache, v_cache: one layer's cache, changed in place.
        window: how many positions a query sees, itself among them; None: all.
        chunk: positions are cut into runs of this length, and a query sees its own run only; not with a window.
        sinks: [Hq], an extra logit per head in the denominator.
        alibi_slopes: [Hq]; not with `metadata.ends`.
        k_scale, v_scale: of a quantized cache, changed in place.
        out: [T, Hq, Dv] contiguous, to be filled; made if None. Of the query's dtype, or float32 except with the C++
            kernels.
        lse: float32 [T, Hq] contiguous, to be filled with log(sum_j exp(s[j])), never including the sink, as `merge_states`
            wants it; -inf of a row that sees nothing. Not with the C++ kernels.
        split_size: the Triton kernel sums the keys of a decode in runs of this many (rounded up to its tiles), so that a
            sequence's result has the same bits whatever other sequences are in the batch. Those of the other
            backends always do.

    Returns:
        [T, Hq, Dv] in the dtype of `out`, the query's by default.
    """
    checks.check_attention(query, key, value, k_cache, v_cache, metadata, window, chunk, softcap, sinks, alibi_slopes)
    checks.check_scales(k_scale, v_scale, k_cache)
    checks.check_results(query, v_cache.shape[3], out, lse, split_size)
    run = _launcher(backend, query.device).attention_
    return run(query, key, value, k_cache, v_cache, metadata, scale=scale, window=window, chunk=chunk,
               softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale, out=out,
               lse=lse, split_size=split_size)  # fmt: skip


def merge_states(
    parts: Tensor, part_lses: Tensor, *, sinks: Tensor | None = None, out: Tensor | None = None,
    lse: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Attention over the union of disjoint sets of keys, from the results over each of them (without sinks).

        out = sum_p exp(lse[p]) part[p] / (sum_p exp(lse[p]) + exp(sink))

    Args:
        parts: [P, T, H, D] of any float dtype, each part contiguous. What a part holds where its lse is -inf does not
            matter.
        part_lses: float32 [P, T, H], each part contiguous: natural logarithms.
        sinks: [H], an extra logit per head in the denominator.
        out: [T, H, D] contiguous, to be filled; made in the dtype of `parts` if None.
        lse: float32 [T, H] contiguous, to be filled with log(sum_p exp(lse[p])), without the sink.
    """
    if out is None and parts.dim() == 4:
        out = parts.new_empty(parts.shape[1:])
    checks.check_parts(parts, part_lses, sinks, out, lse)
    if resolve_backend(backend, parts.device) == "triton":
        from .triton.merge import merge_states as run
    else:
        run = _reference.merge_states
    return run(parts, part_lses, out, sinks=sinks, lse=lse)


def store_kv(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Write key [T, Hkv, Dk] and value [T, Hkv, Dv] to the slots of slot_mapping [T] (int64; -1: skip the token)."""
    checks.check_cache(k_cache, v_cache)
    checks.check_scales(k_scale, v_scale, k_cache)
    checks.check_new_kv(key, value, k_cache, v_cache)
    checks.check_index("slot_mapping", slot_mapping, torch.int64, 1)
    if slot_mapping.shape[0] != key.shape[0]:
        raise ValueError(f"slot_mapping has {slot_mapping.shape[0]} entries for {key.shape[0]} tokens")
    run = _launcher(backend, key.device).store_kv
    run(key, value, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)


def rotary_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """What lies between the projections and attention: norms of heads, rotary embedding, the write to the cache.

    With h a query or key head of token t, normed if there is a norm, and R = cos.shape[1] of its Dk dimensions rotated:

        h[:R] * cos[t] + rotate_half(h[:R]) * sin[t],  h[R:]      rotate_half(x) = [-x[R/2:], x[:R/2]]

    Every step is rounded to the dtype where the eager modules of transformers round. One kernel on Triton.

    Args:
        query, key, value: [T, Hq, Dk], [T, Hkv, Dk] and [T, Hkv, Dv] of one dtype, views with any strides over tokens
            and heads, as of a merged projection.
        k_cache, v_cache: one layer's cache, changed in place.
        slot_mapping: int64 [T]; -1: the token is not written.
        cos, sin: [T, R] of the query's dtype, R even, as transformers makes them: both halves of R hold the
            frequencies. Both None: nothing is rotated.
        q_norm, k_norm: RMS norm of every query and key head, with weight [Dk] of the query's dtype.
        k_scale, v_scale: of a quantized cache, changed in place.

    Returns:
        The queries for `attention_`, [T, Hq, Dk] contiguous.
    """
    checks.check_cache(k_cache, v_cache)
    checks.check_scales(k_scale, v_scale, k_cache)
    checks.check_new_kv(key, value, k_cache, v_cache)
    checks.check_index("slot_mapping", slot_mapping, torch.int64, 1)
    num_tokens, _, dim = checks.shape3("query", query)
    if dim != key.shape[2] or query.dtype != key.dtype:
        raise ValueError(f"query is {query.dtype} {list(query.shape)} and key {key.dtype} {list(key.shape)}")
    for name, tensor in (("key", key), ("slot_mapping", slot_mapping)):
        if tensor.shape[0] != num_tokens:
            raise ValueError(f"{name} has {tensor.shape[0]} rows and query {num_tokens}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride(2) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, not strided {tensor.stride()}")
    checks.check_rotary(cos, sin, query)
    checks.check_norm("q_norm", q_norm, query)
    checks.check_norm("k_norm", k_norm, query)
    run = _module("rotary_store", backend, query.device).rotary_store
    return run(query, key, value, k_cache, v_cache, slot_mapping, cos, sin, q_norm=q_norm, k_norm=k_norm,
               k_scale=k_scale, v_scale=v_scale)  # fmt: skip


def copy_blocks(
    k_cache: Tensor,
    v_cache: Tensor,
    pairs: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Copy whole blocks; pairs int64 [n, 2] of (source, destination). No destination may be a source."""
    checks.check_cache(k_cache, v_cache)
    checks.check_scales(k_scale, v_scale, k_cache)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs must be int64 [n, 2], not {pairs.dtype} {list(pairs.shape)}")
    if resolve_backend(backend, k_cache.device) == "triton":
        from .triton.blocks import copy_blocks as run
    else:
        run = _reference.copy_blocks
    run(k_cache, v_cache, pairs, k_scale=k_scale, v_scale=v_scale)


def gather_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_row: Tensor,
    length: int,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first `length` positions of one sequence as key [L, Hkv, Dk] and value [L, Hkv, Dv].

    In the cache's dtype; float32 of a quantized cache.
    """
    checks.check_cache(k_cache, v_cache)
    checks.check_scales(k_scale, v_scale, k_cache)
    block_size = v_cache.shape[2]
    if not 0 <= length <= block_table_row.shape[0] * block_size:
        raise ValueError(f"length {length} is not within the {block_table_row.shape[0]} blocks of block_table_row")
    return _reference.gather_kv(k_cache, v_cache, block_table_row, length, k_scale=k_scale, v_scale=v_scale)


def read_keys(k_cache: Tensor, slots: Tensor, *, k_scale: Tensor | None = None) -> Tensor:
    """The keys [T, Hkv, Dk] at slots [T] (int64), in the cache's dtype; float32 of a quantized cache."""
    checks.check_index("slots", slots, torch.int64, 1)
    return _reference.read_keys(k_cache, slots, k_scale=k_scale)


def allocate_kv(
    num_blocks: int,
    num_kv_heads: int,
    k_head_dim: int,
    v_head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    values_in_keys: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """An uninitialised cache of one layer: k_cache [N, Hkv, Dk, block_size], v_cache [N, Hkv, block_size, Dv].

    `backend` decides how keys lie in memory; those of any other can use the cache too, but not the C++ kernels one made
    for Triton. A quantized cache needs scales, too: `allocate_scales`.

    With `values_in_keys`, for one KV head on Triton, v_cache is a view of the first Dv dimensions in k_cache: for latent
    attention (MLA), whose value is the first part of its key. `store_kv` then takes key[..., :Dv] as the value.
    """
    sizes = dict(num_blocks=num_blocks, num_kv_heads=num_kv_heads, k_head_dim=k_head_dim, v_head_dim=v_head_dim)
    checks.check_cache_sizes(block_size, **sizes)
    name = resolve_backend(backend, device)
    if reason := why_unsupported(name, device, kv_dtype=dtype):
        raise ValueError(f"dtype {dtype} is not possible with backend {name!r}: {reason}")
    if name == "triton":
        k_cache = torch.empty(num_blocks, num_kv_heads, block_size, k_head_dim, dtype=dtype, device=device).mT
    else:
        k_cache = torch.empty(num_blocks, num_kv_heads, k_head_dim, block_size, dtype=dtype, device=device)
    if not values_in_keys:
        return k_cache, torch.empty(num_blocks, num_kv_heads, block_size, v_head_dim, dtype=dtype, device=device)
    if name != "triton" or num_kv_heads != 1 or v_head_dim >= k_head_dim or dtype in checks.QUANTIZED_DTYPES:
        raise ValueError(f"values_in_keys is for one KV head on Triton with v_head_dim below k_head_dim and a dtype of "
                         f"{checks.FLOAT_DTYPES}")  # fmt: skip
    return k_cache, k_cache.mT[..., :v_head_dim]


def allocate_scales(v_cache: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Uninitialised (k_scale, v_scale) [N, Hkv, block_size] for a layer's cache; None for one that is not quantized."""
    if v_cache.dtype not in checks.QUANTIZED_DTYPES:
        return None, None
    k_scale, v_scale = torch.empty(2, *v_cache.shape[:3], dtype=torch.float32, device=v_cache.device)
    return k_scale, v_scale


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """The backend that "auto" means on this device; another name is returned if it can run, else a ValueError."""
    device = torch.device(device)
    if backend == "auto":
        own = OWN_BACKEND.get(device.type)
        return own if own is not None and why_unsupported(own, device) is None else "reference"
    reason = why_unsupported(backend, device)
    if reason:
        raise ValueError(f"backend {backend!r} cannot run on {device}: {reason}")
    return backend


def supports(
    backend: str,
    device: torch.device | str,
    *dtypes: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> bool:
    """Whether a backend runs on this device with queries, keys and values of these dtypes and a cache of `kv_dtype`.

    `head_dim`: the largest size of a head, but for those whose values lie in their keys.
    """
    return why_unsupported(backend, device, *dtypes, kv_dtype=kv_dtype, head_dim=head_dim) is None


def why_unsupported(
    backend: str,
    device: torch.device | str,
    *dtypes: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> str | None:
    """The reason why `supports` is False, or None."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {BACKENDS}")
    for dtype in dtypes:
        if dtype not in checks.FLOAT_DTYPES:
            return f"dtype {dtype} is not one of {checks.FLOAT_DTYPES}"
    if kv_dtype is not None and kv_dtype not in checks.FLOAT_DTYPES + checks.QUANTIZED_DTYPES:
        return f"{kv_dtype} is not one of {checks.FLOAT_DTYPES + checks.QUANTIZED_DTYPES}"
    if backend == "auto":
        backend = resolve_backend(backend, device)
    if backend == "triton":
        from .triton import launch

        if head_dim is not None and head_dim > checks.TRITON_MAX_HEAD_DIM:
            return f"its heads have at most {checks.TRITON_MAX_HEAD_DIM} dimensions, not {head_dim}"
        return launch.why_unavailable(device) or launch.why_dtype_unavailable(device, kv_dtype)
    if backend != "cpu":
        return None
    if torch.device(device).type != "cpu":
        return "it runs on CPU tensors only"
    from .cpu import build

    return build.why_unavailable()


def _launcher(backend: str, device: torch.device):
    """The module that implements a backend, imported on first use."""
    global _cpu
    if backend == "reference":
        return _reference
    if _cpu is not None and device.type == "cpu" and backend in ("auto", "cpu") and _cpu.build.available():
        return _cpu  # the short way: one layer's call costs microseconds
    name = resolve_backend(backend, device)
    if name == "reference":
        return _reference
    if name == "triton":
        from .triton import attention

        return attention
    from .cpu import attention as _cpu

    return _cpu


def _module(name: str, backend: str, device: torch.device):
    """The module `name` of the backend's package."""
    package = {"reference": "ref"}.get(resolved := resolve_backend(backend, device), resolved)
    return import_module(f".{package}.{name}", __package__)
