"""Norms, gated activations and rotary embedding. Signatures and formulas are those of `ref.elementwise`.

Results are rounded where eager torch rounds. Rotary embedding has its very bits. A norm's sum over a row has another
order than torch's: its scale may differ by some units in the last place of fp32, and so, by one unit, about one value
of the row in ten thousand in bf16, in a thousand in fp16. The same holds for exponentials in activations.

Rows are kept in registers whole. What does not fit, and fp8 where the GPU cannot convert to it, is left to torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm import CASTS, Norm
from ..quantized import DTYPES
from ..ref import elementwise as reference
from .functions import ACTIVATIONS, activate, rounded, scaled_by_weight
from .launch import arch, launch
from .quantize import quantize

_MAX_ROW = 16384  # elements: 32 a thread of 16 warps, inputs and weight beside each other without a spill
_TILE = 2048  # elements of a program where rows are short or need not be whole: a 16-byte load for each of 256 threads
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _store_rows(out, scale_out, y, row, row_inside, to, inside, DTYPE: tl.constexpr):
    """Store y [ROWS, BLOCK] at `to`: as DTYPE, or in 8 bits with scales where there is a `scale_out`."""
    if scale_out is not None:
        q, scale = quantize(tl.where(inside, rounded(y, DTYPE), 0.0), out.dtype.element_ty)
        tl.store(out + to, q, mask=inside)
        tl.store(scale_out + row, scale, mask=row_inside)
    else:
        tl.store(out + to, y.to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=("num_rows", "rows_per_group"))
def _rms_norm_kernel(
    x, residual, weight, total, out, scale_out, num_rows, rows_per_group, size, stride_group, stride_row,
    residual_stride, eps, offset, inverse_size, WEIGHT_AFTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (at < size)[None, :]
    start = (row // rows_per_group).to(tl.int64) * stride_group + (row % rows_per_group).to(tl.int64) * stride_row
    value = tl.load(x + start[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
    contiguous = row.to(tl.int64)[:, None] * size + at[None, :]
    if residual is not None:
        other = row.to(tl.int64)[:, None] * residual_stride + at[None, :]
        value = rounded(tl.load(residual + other, mask=inside, other=0.0).to(tl.float32) + value, DTYPE)
        tl.store(total + contiguous, value.to(DTYPE), mask=inside)
    # As torch on CUDA: the mean is a product with 1 / size.
    y = value * tl.rsqrt(tl.sum(value * value, axis=1) * inverse_size + eps)[:, None]
    if weight is not None:
        w = tl.load(weight + at, mask=at < size, other=0.0).to(tl.float32)[None, :]
        y = scaled_by_weight(y, w, offset, WEIGHT_AFTER, DTYPE)
    _store_rows(out, scale_out, y, row, row < num_rows, contiguous, inside, DTYPE)


@triton.jit
def _layer_norm_kernel(
    x, weight, bias, out, scale_out, size, stride_row, eps, inverse_size, BLOCK: tl.constexpr
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    at = tl.arange(0, BLOCK)
    inside = (at < size)[None, :]
    value = tl.load(x + row[:, None] * stride_row + at[None, :], mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - (tl.sum(value, axis=1) * inverse_size)[:, None], 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, axis=1) * inverse_size + eps)[:, None]
    if weight is not None:
        y = y * tl.load(weight + at, mask=at < size, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y = y + tl.load(bias + at, mask=at < size, other=0.0).to(tl.float32)[None, :]
    _store_rows(out, scale_out, y, row, row >= 0, row[:, None] * size + at[None, :], inside, DTYPE)


@triton.jit
def _act_and_mul_kernel(
    gate_up, out, scale_out, size, stride_row, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    DTYPE: tl.constexpr = gate_up.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (at < size)[None, :]
    start = gate_up + row[:, None] * stride_row + at[None, :]
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + size, mask=inside, other=0.0).to(tl.float32)
    y = rounded(activate(gate, ACTIVATION), DTYPE) * up
    # With scales the grid's second axis is 1: the row is whole.
    _store_rows(out, scale_out, y, row, row >= 0, row[:, None] * size + at[None, :], inside, DTYPE)


@triton.jit
def _rotate_heads(
    x, out, cos, sin, first_head, num_heads, stride_token, stride_head, size, half, rest, cos_stride, sin_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = first_head + tl.arange(0, HEADS)
    at = tl.arange(0, HALF)
    inside = (head < num_heads)[:, None] & (at < half)[None, :]
    source = x + token * stride_token + head.to(tl.int64)[:, None] * stride_head
    target = out + (token * num_heads + head)[:, None] * size
    low = tl.load(source + at[None, :], mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + half + at[None, :], mask=inside, other=0.0).to(tl.float32)
    cos += token * cos_stride + at
    sin += token * sin_stride + at
    cos_low = tl.load(cos, mask=at < half, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + half, mask=at < half, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin, mask=at < half, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + half, mask=at < half, other=0.0).to(tl.float32)[None, :]
    new_low = rounded(low * cos_low, DTYPE) - rounded(high * sin_low, DTYPE)
    new_high = rounded(high * cos_high, DTYPE) + rounded(low * sin_high, DTYPE)
    tl.store(target + at[None, :], new_low.to(DTYPE), mask=inside)
    tl.store(target + half + at[None, :], new_high.to(DTYPE), mask=inside)
    if REST:
        at = tl.arange(0, REST)
        inside = (head < num_heads)[:, None] & (at < rest)[None, :]
        passed = tl.load(source + 2 * half + at[None, :], mask=inside)
        tl.store(target + 2 * half + at[None, :], passed, mask=inside)


@triton.jit
def _rotary_kernel(
    q, q_out, k, k_out, cos, sin, q_heads, k_heads, q_stride, q_head_stride, k_stride, k_head_stride, size, half, rest,
    cos_stride, sin_stride, Q_PROGRAMS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(1)
    if program < Q_PROGRAMS:
        _rotate_heads(q, q_out, cos, sin, program * HEADS, q_heads, q_stride, q_head_stride, size, half, rest,
                      cos_stride, sin_stride, HEADS, HALF, REST)  # fmt: skip
    else:
        _rotate_heads(k, k_out, cos, sin, (program - Q_PROGRAMS) * HEADS, k_heads, k_stride, k_head_stride, size, half,
                      rest, cos_stride, sin_stride, HEADS, HALF, REST)  # fmt: skip


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: str = "weight_after",
    quantize: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `ref.elementwise.rms_norm`. x [..., H] has a contiguous last dimension; [T, heads, H] may be a view."""
    norm = Norm(weight, eps, offset, cast)
    _check_norm(x, norm, quantize)
    if not _whole_rows(x.shape[-1], quantize, x.device):
        normed = reference.rms_norm(x, weight, eps, offset=offset, cast=cast)
        return reference.quantized(normed, quantize)
    out, scale = _empty(x.shape, x, quantize)
    _launch_rms_norm(x, None, None, norm, out, scale)
    return out if quantize is None else (out, scale)


def add_rms_norm(x: Tensor, residual: Tensor, norm: Norm, *, quantize: str | None = None):
    """See `ref.elementwise.add_rms_norm`."""
    _check_norm(x, norm, quantize)
    _check("residual", residual, x, x.shape)
    if not _whole_rows(x.shape[-1], quantize, x.device):
        return reference.add_rms_norm(x, residual, norm, quantize=quantize)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out, scale = _empty(x.shape, x, quantize)
    _launch_rms_norm(x, residual, total, norm, out, scale)
    return (out if quantize is None else (out, scale)), total


def _launch_rms_norm(x, residual, total, norm: Norm, out, scale) -> None:
    size = x.shape[-1]
    x = x if x.dim() == 3 else x.reshape(1, -1, size)
    groups, rows_per_group, _ = x.shape
    num_rows = groups * rows_per_group
    if residual is not None:
        residual = residual.reshape(-1, size)
    if not num_rows:
        return
    block = triton.next_power_of_2(size)
    rows = max(1, min(_TILE // block, triton.next_power_of_2(num_rows)))
    launch(_rms_norm_kernel, (triton.cdiv(num_rows, rows),), x, residual, norm.weight, total, out, scale, num_rows,
           rows_per_group, size, x.stride(0), x.stride(1), 0 if residual is None else residual.stride(0), norm.eps,
           norm.offset, 1.0 / size, WEIGHT_AFTER=norm.cast == "weight_after",  ROWS=rows,
           BLOCK=block, num_warps=_num_warps(rows * block))  # fmt: skip


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, quantize: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `ref.elementwise.layer_norm`."""
    size = x.shape[-1]
    _check("x", x, x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check(name, parameter, x, (size,))
    _check_choice("quantize", quantize, (None, *DTYPES))
    if not _whole_rows(size, quantize, x.device):
        return reference.layer_norm(x, weight, bias, eps, quantize=quantize)
    out, scale = _empty(x.shape, x, quantize)
    rows = x.reshape(-1, size)
    if len(rows):
        block = triton.next_power_of_2(size)
        launch(_layer_norm_kernel, (len(rows),), rows, weight, bias, out, scale, size, rows.stride(0), eps, 1.0 / size,
               BLOCK=block, num_warps=_num_warps(block))  # fmt: skip
    return out if quantize is None else (out, scale)


def act_and_mul(gate_up: Tensor, activation: str, *, quantize: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """See `ref.elementwise.act_and_mul`."""
    size = gate_up.shape[-1] // 2
    _check("gate_up", gate_up, gate_up, (*gate_up.shape[:-1], 2 * size))
    _check_choice("activation", activation, ACTIVATIONS)
    _check_choice("quantize", quantize, (None, *DTYPES))
    if not _whole_rows(size if quantize else 1, quantize, gate_up.device):
        return reference.quantized(act_and_mul(gate_up, activation), quantize)
    out, scale = _empty((*gate_up.shape[:-1], size), gate_up, quantize)
    rows = gate_up.reshape(-1, 2 * size)
    if len(rows):
        block = triton.next_power_of_2(size)
        block = block if quantize else min(block, _TILE)
        launch(_act_and_mul_kernel, (len(rows), triton.cdiv(size, block)), rows, out, scale, size, rows.stride(0),
               ACTIVATION=activation,  BLOCK=block, num_warps=_num_warps(block))  # fmt: skip
    return out if quantize is None else (out, scale)


def rotary(q_THD: Tensor, k_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    """See `ref.elementwise.rotary`; contiguous results. One launch for both, a program per token and few heads."""
    num_tokens, q_heads, size = q_THD.shape
    k_heads, half = k_THD.shape[1], cos_TR.shape[1] // 2
    for name, tensor, heads in (("q", q_THD, q_heads), ("k", k_THD, k_heads)):
        _check(name, tensor, q_THD, (num_tokens, heads, size))
    for name, tensor in (("cos", cos_TR), ("sin", sin_TR)):
        _check(name, tensor, q_THD, (num_tokens, 2 * half))
    if 2 * half > size:
        raise ValueError(f"cos has {2 * half} columns, more than q's head size {size}")
    rest = size - 2 * half
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THD, k_THD))
    block = triton.next_power_of_2(half)
    heads = max(1, min(512 // block, triton.next_power_of_2(q_heads)))  # 512: four values and their partners a thread
    q_programs, k_programs = triton.cdiv(q_heads, heads), triton.cdiv(k_heads, heads)
    if num_tokens:
        # Without fusing a * b + c, so that the products are rounded in fp32 too, as torch's are.
        launch(_rotary_kernel, (num_tokens, q_programs + k_programs), q_THD, q_out, k_THD, k_out, cos_TR, sin_TR,
               q_heads, k_heads, q_THD.stride(0), q_THD.stride(1), k_THD.stride(0), k_THD.stride(1), size, half, rest,
               cos_TR.stride(0), sin_TR.stride(0), Q_PROGRAMS=q_programs, HEADS=heads, HALF=block,
               REST=triton.next_power_of_2(rest) if rest else 0, num_warps=4, enable_fp_fusion=False)  # fmt: skip
    return q_out, k_out


def _check_norm(x: Tensor, norm: Norm, quantize: str | None) -> None:
    _check("x", x, x)
    if norm.weight is not None:
        _check("weight", norm.weight, x, x.shape[-1:])
    _check_choice("cast", norm.cast, CASTS)
    _check_choice("quantize", quantize, (None, *DTYPES))


def _check(name: str, tensor: Tensor, like: Tensor, shape=None) -> None:
    """float32, bfloat16 or float16 as `like`, on its device, the last dimension contiguous, of that shape."""
    wrong = tensor.dtype not in _FLOATS or tensor.dtype != like.dtype or tensor.device != like.device
    if wrong or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1) or (shape is not None and tensor.shape != shape):
        wanted = "" if shape is None else f" {list(shape)}"
        raise ValueError(
            f"{name} must be {like.dtype if like.dtype in _FLOATS else 'float32, bfloat16 or float16'}{wanted} on "
            f"{like.device} with a contiguous last dimension, not {tensor.dtype} {list(tensor.shape)} strides "
            f"{list(tensor.stride())} on {tensor.device}"
        )


def _check_choice(name: str, value, known: tuple) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(map(str, known))}")


def _whole_rows(size: int, quantize: str | None, device: torch.device) -> bool:
    """Whether a program can hold such a row, and convert it to fp8 if asked to (since compute capability 8.9)."""
    if quantize == "fp8" and arch(device) in ("sm_80", "sm_86", "sm_87"):
        return False
    return size <= _MAX_ROW


def _num_warps(elements: int) -> int:
    """8 elements a thread, one 16-byte load: what a step of one token waits for is the latency of a row."""
    return max(1, min(16, elements // 256))


def _empty(shape, like: Tensor, quantize: str | None) -> tuple[Tensor, Tensor | None]:
    if quantize is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device), None
    scale = torch.empty((*shape[:-1], 1), dtype=torch.float32, device=like.device)
    return torch.empty(shape, dtype=DTYPES[quantize], device=like.device), scale
