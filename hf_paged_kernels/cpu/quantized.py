"""Linear layers on quantized weights: see quantized.cpp and quantized_int8.cpp. No autograd.

Sums are fp32, in the order of `linear.linear`: of float32 x the result is bit for bit what that gives on the
dequantized weight (its columns in the order of the data, if there is `perm`). bfloat16 and float16 x are widened, and
the result is rounded once. `activations` of "int8" are honoured; those of "fp8", for which a CPU has no instructions,
are not rounded.
"""

from __future__ import annotations

import ctypes
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..norm import Norm
from ..quantized import LANES, QuantizedWeight
from ..ref.quantized import rounded_rows
from . import build, elementwise

_KINDS = {"int2": 0, "int3": 1, "int4": 2, "int8": 3, "fp8": 4}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Weight(ctypes.Structure):
    """`Quantized` of quantized_values.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in (
            "kind", "scale_dtype", "N", "K", "block_rows", "block_columns", "data_row", "data_expert", "scales_block",
            "scales_expert", "zeros_block", "zeros_expert")),
        ("zero", ctypes.c_double),
    ]  # fmt: skip

    @classmethod
    def of(cls, weight: QuantizedWeight) -> _Weight:
        N, K = weight.shape[-2:]
        data, scales, zeros = weight.data, weight.scales, weight.zeros
        zeros_strides = (0, 0) if zeros is None else (zeros.stride(-2), _expert_stride(zeros))
        return cls(
            data.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr(), _KINDS[weight.kind],
            _DTYPES[scales.dtype], N, K, *weight.block, data.stride(-2), _expert_stride(data), scales.stride(-2),
            _expert_stride(scales), *zeros_strides, weight.zero_point(),
        )  # fmt: skip

    def is_of(self, weight: QuantizedWeight) -> bool:
        """Whether the weight's memory is where it was: `share_memory_` moves that of a tensor."""
        zeros = weight.zeros
        return (
            self.data == weight.data.data_ptr()
            and self.scales == weight.scales.data_ptr()
            and self.zeros == (None if zeros is None else zeros.data_ptr())
        )


_weights: WeakKeyDictionary[QuantizedWeight, _Weight] = WeakKeyDictionary()  # as kernels take them, once asked for


def supports_weight(weight: QuantizedWeight) -> bool:
    """Whether there are kernels for this weight: its groups have a multiple of 16 columns, or all."""
    return _described(weight) is not None


def rounds_to(weight: QuantizedWeight) -> str | None:
    """See `fused.rounds_to`: no CPU multiplies 8-bit floats."""
    return None if weight.activations == "fp8" else weight.activations


def supports(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, norm: Norm | None, activation: str | None
) -> bool:
    """Whether `linear` takes this call: norms and activations are kernels of their own."""
    return (
        norm is None
        and activation is None
        and x.dtype in _DTYPES
        and x.dim() >= 1
        and weight.data.dim() == 2
        and x.shape[-1] == weight.in_features > 0
        and x.device.type == "cpu"
        and supports_weight(weight)
    )


def linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See `fused.linear`; takes what `supports` says. A row's bits do not depend on the other rows, nor on threads."""
    N, K = weight.shape
    shape = x.shape
    rows = x if len(shape) == 2 else x.reshape(-1, K)
    out = _product(rows, weight, bias, None)
    if len(shape) != 2:
        out = out.view(*shape[:-1], N)
    return out if residual is None else out.add_(residual)


def supports_grouped(
    x: Tensor, weight: QuantizedWeight, experts: Tensor, bias: Tensor | None, activation: str | None
) -> bool:
    """Whether `grouped_linear` takes this call."""
    return (
        x.dtype in _DTYPES
        and weight.data.dim() == 3
        and x.shape[-1] == weight.in_features > 0
        and x.device.type == "cpu"
        and supports_weight(weight)
    )


def grouped_linear(
    x: Tensor,
    weight: QuantizedWeight,
    experts: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    max_rows: int | None = None,
) -> Tensor:
    """See `fused.grouped_linear`; any number of rows may fall to an expert."""
    S = len(experts)
    order = experts.argsort(stable=True)
    rows = x[order // (S // max(len(x), 1))] if S else x[:0]
    counts = torch.bincount(experts, minlength=weight.shape[0])
    used = counts.nonzero()[:, 0]
    ends = counts[used].cumsum(0)
    groups = torch.zeros(len(used) + 1, 2, dtype=torch.int64)  # expert, first row; at last the number of rows
    groups[:-1, 0] = used
    groups[1:, 1] = ends
    product = _product(rows, weight, bias, groups)
    if activation is not None:
        product = elementwise.act_and_mul(product, activation)
    result = torch.empty_like(product).index_copy_(0, order, product)
    return result if scale is None else result * scale[:, None]


def _product(rows: Tensor, weight: QuantizedWeight, bias: Tensor | None, groups: Tensor | None) -> Tensor:
    """rows [M, K] @ W.T + bias in the rows' dtype; with `groups` (see quantized.cpp) each by its expert's W."""
    M, N = rows.shape[0], weight.shape[-2]
    x = rows.float()
    in_int8 = _multiplies_int8(weight)
    if weight.activations == "int8" and not in_int8:
        x = rounded_rows(x, weight)
    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    elif x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(M, N)
    if M and N:
        if groups is None:
            pointer, count = ctypes.addressof(whole := (ctypes.c_int64 * 4)(0, 0, 0, M)), 1
        else:
            pointer, count = groups.data_ptr(), len(groups) - 1
        bias = None if bias is None else bias.float().contiguous()
        arguments = (
            ctypes.addressof(_described(weight)), x.data_ptr(), x.stride(0), None if bias is None else bias.data_ptr(),
            out.data_ptr(), N, pointer, count,
        )  # fmt: skip
        if in_int8:
            scale = weight.input_scale
            _kernel("hf_paged_quantized_linear_int8")(*arguments, None if scale is None else scale.data_ptr())
        else:
            _kernel("hf_paged_quantized_linear")(*arguments)
    return out if rows.dtype == torch.float32 else out.to(rows.dtype)


def _multiplies_int8(weight: QuantizedWeight) -> bool:
    """Whether the products are those of int8 values: their sums must fit in int32."""
    return weight.activations == weight.kind == "int8" and weight.zeros is None and weight.in_features <= 65536


def _described(weight: QuantizedWeight) -> _Weight | None:
    """The weight as kernels take it, or None if there are none for it."""
    described = _weights.get(weight)
    if (described is None or not described.is_of(weight)) and _fits(weight):
        described = _weights[weight] = _Weight.of(weight)
    return described


def _fits(weight: QuantizedWeight) -> bool:
    columns = weight.block[1]
    return (
        weight.device.type == "cpu"
        and weight.scales.dtype in _DTYPES
        and (weight.zeros is None or weight.kind != "fp8")
        and (columns % LANES == 0 or columns >= weight.in_features)
        and all(t is None or t.stride(-1) == 1 or t.shape[-1] == 1 for t in (weight.data, weight.scales, weight.zeros))
    )


def _expert_stride(tensor: Tensor) -> int:
    return tensor.stride(0) if tensor.dim() == 3 else 0


@cache
def _kernel(name: str):
    function = getattr(build.load(), name)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    own = [pointer] if name == "hf_paged_quantized_linear_int8" else []
    function.argtypes = [pointer, pointer, size, pointer, pointer, size, pointer, size, *own]
    function.restype = None
    return function
