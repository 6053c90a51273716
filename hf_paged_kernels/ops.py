"""The public signatures of the attention kernels: argument checks, then dispatch to a backend.

Letters in shapes: T tokens of the packed batch, S sequences, B blocks per table row, Hq query heads, Hkv key/value
heads (a divisor of Hq), Dk and Dv head sizes.

A layer's cache is two tensors:

    k_cache [num_blocks, Hkv, Dk, block_size]
    v_cache [num_blocks, Hkv, block_size, Dv]

On CPU both are contiguous: keys are dim-major, so that 16 scores at a time need no horizontal sum. For Triton a block's
keys lie in memory as [block_size, Dk], token by token, and k_cache is a view of that (see `allocate_kv`).

Backends: "cpu" (C++, compiled on first use), "triton" (CUDA and ROCm; CPU tensors in Triton's interpreter) and
"reference" (plain torch, any device). "auto" takes the device's own if it can run, else the reference. All of them
promise the same: slots no query may see are never read into a result, whatever they hold.
The C++ backend promises more: a row's result has the same bits whatever else is in the batch, however its prompt was
cut into chunks, on any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor

from .norm import CASTS, Norm
from .ref import attention as _reference

BACKENDS = ("auto", "cpu", "triton", "reference")
OWN_BACKEND = {"cpu": "cpu", "cuda": "triton"}  # device type -> what "auto" means there
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_cpu = None  # the module of C++ launchers, once something needed it


@dataclass(eq=False)
class AttentionMetadata:
    """What one step's batch looks like; made once a step (per block group) and used by every layer.

    All tensors are contiguous and on the cache's device. They may be refilled in place between steps.

    Attributes:
        cu_seqlens_q: int32 [S+1], where each sequence's rows start in the packed batch; from 0 to T.
        seq_lens: int32 [S], tokens of each sequence after this step (cached and new).
        block_table: int32 [S, B], block of each `block_size` positions; -1 where no query of the step may look.
        slot_mapping: int64 [T], block * block_size + offset where each token is written; -1: not written.
        max_seqlen_q: the most new tokens of any sequence.
        max_seqlen_k: the longest sequence.
    """

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    _launch: dict = field(default_factory=dict, init=False, repr=False)  # a backend's own per-step preparation

    def __post_init__(self):
        _check_index("cu_seqlens_q", self.cu_seqlens_q, torch.int32, 1)
        _check_index("seq_lens", self.seq_lens, torch.int32, 1)
        _check_index("block_table", self.block_table, torch.int32, 2)
        _check_index("slot_mapping", self.slot_mapping, torch.int64, 1)
        num_seqs = self.seq_lens.shape[0]
        if self.cu_seqlens_q.shape[0] != num_seqs + 1:
            raise ValueError(f"cu_seqlens_q has {self.cu_seqlens_q.shape[0]} entries, not {num_seqs} sequences + 1")
        if self.block_table.shape[0] != num_seqs:
            raise ValueError(f"block_table has {self.block_table.shape[0]} rows for {num_seqs} sequences")

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]


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
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Write this step's keys and values into the cache, then attend: prompt chunks and decodes in one call.

    Row i of a sequence is position p = seq_len - q_len + i and sees positions j up to its own: from p - window + 1 if
    there is a window, from p - p % chunk if there is a chunk, else all:

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
        alibi_slopes: [Hq].
        out: [T, Hq, Dv] contiguous, to be filled; made if None.

    Returns:
        [T, Hq, Dv] in the query's dtype.
    """
    _check_attention(query, key, value, k_cache, v_cache, metadata, window, chunk, softcap, sinks, alibi_slopes, out)
    run = _launcher(backend, query.device).attention_
    return run(query, key, value, k_cache, v_cache, metadata, scale=scale, window=window, chunk=chunk,
               softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, out=out)  # fmt: skip


def store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, backend: str = "auto"
) -> None:
    """Write key [T, Hkv, Dk] and value [T, Hkv, Dv] to the slots of slot_mapping [T] (int64; -1: skip the token)."""
    _check_cache(k_cache, v_cache)
    _check_new_kv(key, value, k_cache, v_cache)
    _check_index("slot_mapping", slot_mapping, torch.int64, 1)
    if slot_mapping.shape[0] != key.shape[0]:
        raise ValueError(f"slot_mapping has {slot_mapping.shape[0]} entries for {key.shape[0]} tokens")
    _launcher(backend, key.device).store_kv(key, value, k_cache, v_cache, slot_mapping)


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

    Returns:
        The queries for `attention_`, [T, Hq, Dk] contiguous.
    """
    _check_cache(k_cache, v_cache)
    _check_new_kv(key, value, k_cache, v_cache)
    _check_index("slot_mapping", slot_mapping, torch.int64, 1)
    num_tokens, _, dim = _shape3("query", query)
    if dim != key.shape[2] or query.dtype != key.dtype:
        raise ValueError(f"query is {query.dtype} {list(query.shape)} and key {key.dtype} {list(key.shape)}")
    for name, tensor in (("key", key), ("slot_mapping", slot_mapping)):
        if tensor.shape[0] != num_tokens:
            raise ValueError(f"{name} has {tensor.shape[0]} rows and query {num_tokens}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride(2) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, not strided {tensor.stride()}")
    _check_rotary(cos, sin, query)
    _check_norm("q_norm", q_norm, query)
    _check_norm("k_norm", k_norm, query)
    run = _module("rotary_store", backend, query.device).rotary_store
    return run(query, key, value, k_cache, v_cache, slot_mapping, cos, sin, q_norm=q_norm, k_norm=k_norm)


def copy_blocks(k_cache: Tensor, v_cache: Tensor, pairs: Tensor, *, backend: str = "auto") -> None:
    """Copy whole blocks; pairs int64 [n, 2] of (source, destination). No destination may be a source."""
    _check_cache(k_cache, v_cache)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs must be int64 [n, 2], not {pairs.dtype} {list(pairs.shape)}")
    if resolve_backend(backend, k_cache.device) == "triton":
        from .triton.blocks import copy_blocks as run
    else:
        run = _reference.copy_blocks
    run(k_cache, v_cache, pairs)


def gather_kv(k_cache: Tensor, v_cache: Tensor, block_table_row: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` positions of one sequence as key [L, Hkv, Dk] and value [L, Hkv, Dv]."""
    _check_cache(k_cache, v_cache)
    block_size = v_cache.shape[2]
    if not 0 <= length <= block_table_row.shape[0] * block_size:
        raise ValueError(f"length {length} is not within the {block_table_row.shape[0]} blocks of block_table_row")
    return _reference.gather_kv(k_cache, v_cache, block_table_row, length)


def allocate_kv(
    num_blocks: int,
    num_kv_heads: int,
    k_head_dim: int,
    v_head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """An uninitialised cache of one layer: k_cache [N, Hkv, Dk, block_size], v_cache [N, Hkv, block_size, Dv].

    `backend` decides how keys lie in memory; those of any other can use the cache too, but not the C++ kernels one made
    for Triton.
    """
    sizes = dict(num_blocks=num_blocks, num_kv_heads=num_kv_heads, k_head_dim=k_head_dim, v_head_dim=v_head_dim)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
    if block_size < 16 or block_size % 16:
        raise ValueError(f"block_size must be a multiple of 16, not {block_size}")
    if dtype not in _FLOAT_DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {_FLOAT_DTYPES}")
    if resolve_backend(backend, device) == "triton":
        k_cache = torch.empty(num_blocks, num_kv_heads, block_size, k_head_dim, dtype=dtype, device=device).mT
    else:
        k_cache = torch.empty(num_blocks, num_kv_heads, k_head_dim, block_size, dtype=dtype, device=device)
    v_cache = torch.empty(num_blocks, num_kv_heads, block_size, v_head_dim, dtype=dtype, device=device)
    return k_cache, v_cache


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


def supports(backend: str, device: torch.device | str, *dtypes: torch.dtype) -> bool:
    """Whether a backend runs on this device with these dtypes (of queries, cache)."""
    return why_unsupported(backend, device, *dtypes) is None


def why_unsupported(backend: str, device: torch.device | str, *dtypes: torch.dtype) -> str | None:
    """The reason why `supports` is False, or None."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {BACKENDS}")
    for dtype in dtypes:
        if dtype not in _FLOAT_DTYPES:
            return f"dtype {dtype} is not one of {_FLOAT_DTYPES}"
    if backend == "triton":
        from .triton import launch

        return launch.why_unavailable(device)
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


def _check_attention(query, key, value, k_cache, v_cache, metadata, window, chunk, softcap, sinks, alibi_slopes, out):
    _check_cache(k_cache, v_cache)
    num_tokens, num_heads, k_head_dim = _shape3("query", query)
    num_kv_heads, v_head_dim = v_cache.shape[1], v_cache.shape[3]
    if query.dtype not in _FLOAT_DTYPES:
        raise ValueError(f"query has dtype {query.dtype}, not one of {_FLOAT_DTYPES}")
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
        _check_new_kv(key, value, k_cache, v_cache)
        if key.shape[0] != num_tokens:
            raise ValueError(f"key has {key.shape[0]} rows and query {num_tokens}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    if chunk is not None and (chunk < 1 or window is not None):
        raise ValueError(f"chunk must be at least 1 and without a window, not {chunk} with window {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    for name, per_head in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if per_head is not None and tuple(per_head.shape) != (num_heads,):
            raise ValueError(f"{name} has shape {list(per_head.shape)}, not [{num_heads}]")
    if out is not None:
        if tuple(out.shape) != (num_tokens, num_heads, v_head_dim) or not out.is_contiguous():
            raise ValueError(f"out must be contiguous [{num_tokens}, {num_heads}, {v_head_dim}]")
        if out.dtype != query.dtype:
            raise ValueError(f"out has dtype {out.dtype} and query {query.dtype}")


def _check_cache(k_cache: Tensor, v_cache: Tensor) -> None:
    k_shape, v_shape = k_cache.shape, v_cache.shape
    if len(k_shape) != 4:
        raise ValueError(f"k_cache must be [num_blocks, Hkv, Dk, block_size], not {list(k_shape)}")
    if len(v_shape) != 4:
        raise ValueError(f"v_cache must be [num_blocks, Hkv, block_size, Dv], not {list(v_shape)}")
    if k_shape[0] != v_shape[0] or k_shape[1] != v_shape[1] or k_shape[3] != v_shape[2]:
        raise ValueError(f"v_cache {list(v_shape)} does not fit k_cache {list(k_shape)}")
    if k_shape[3] % 16:
        raise ValueError(f"k_cache has block size {k_shape[3]}, not a multiple of 16")
    if k_cache.dtype not in _FLOAT_DTYPES or v_cache.dtype != k_cache.dtype:
        raise ValueError(f"k_cache and v_cache have dtypes {k_cache.dtype}, {v_cache.dtype}: one of {_FLOAT_DTYPES}")


def _check_new_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    key_shape, value_shape = _shape3("key", key), _shape3("value", value)
    if key_shape[1:] != k_cache.shape[1:3]:
        raise ValueError(f"key has shape {list(key_shape)}, k_cache holds {list(k_cache.shape[1:3])} a token")
    if value_shape[1] != v_cache.shape[1] or value_shape[2] != v_cache.shape[3]:
        raise ValueError(f"value has shape {list(value_shape)}, v_cache holds {list(v_cache.shape[1::2])} a token")
    if value_shape[0] != key_shape[0]:
        raise ValueError(f"value has {value_shape[0]} rows and key {key_shape[0]}")
    if key.dtype not in _FLOAT_DTYPES or value.dtype != key.dtype:
        raise ValueError(f"key and value have dtypes {key.dtype}, {value.dtype}: both must be one of {_FLOAT_DTYPES}")


def _check_rotary(cos: Tensor | None, sin: Tensor | None, query: Tensor) -> None:
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


def _check_norm(name: str, norm: Norm | None, query: Tensor) -> None:
    if norm is None:
        return
    if norm.cast not in CASTS:
        raise ValueError(f"{name}.cast {norm.cast!r} is not one of {CASTS}")
    weight, dim = norm.weight, query.shape[2]
    if weight is not None and (weight.shape != (dim,) or weight.dtype != query.dtype or not weight.is_contiguous()):
        raise ValueError(f"{name}.weight must be contiguous {query.dtype} [{dim}], not {weight.dtype} "
                         f"{list(weight.shape)}")  # fmt: skip


def _shape3(name: str, tensor: Tensor) -> torch.Size:
    if tensor.dim() != 3:
        raise ValueError(f"{name} must be [tokens, heads, head size], not {list(tensor.shape)}")
    return tensor.shape


def _check_index(name: str, tensor: Tensor, dtype: torch.dtype, dim: int) -> None:
    if tensor.dtype != dtype or tensor.dim() != dim or not tensor.is_contiguous():
        raise ValueError(f"{name} must be a contiguous {dtype} tensor of {dim} dimensions, not {tensor.dtype} "
                         f"{list(tensor.shape)}")  # fmt: skip
