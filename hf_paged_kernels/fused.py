"""Linear layers and the operations around them in a decoder layer: dispatch to the device's kernels.

Every function takes `backend`, as those of `ops` do: "auto" is the device's own kernels, or plain torch where they
cannot run. `why_unavailable` says where fusing modules into these functions gains nothing.

With autograd on, what exact mode calls in floats knows its gradient (autograd.py): `linear` inside `exact`, `exact_linear`,
`head_linear`, the norms, `act_and_mul` and `rotary`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, ops
from .exactness import is_exact
from .norm import Norm
from .quantized import QuantizedWeight
from .ref import elementwise as _reference
from .ref import quantized as _dequantizing

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_QUANTIZED: tuple[str, ...] = ("cpu", "triton")  # backends with kernels for quantized weights


def why_unavailable(parameter: Tensor, *, backend: str = "auto") -> str | None:
    """Why fused kernels cannot run on a model with such parameters, or None if they can."""
    if backend == "auto":
        backend = ops.OWN_BACKEND.get(parameter.device.type)
        if backend is None:
            return f"no fused kernels for {parameter.device.type}"
    if backend == "reference":
        return "plain torch has no fused kernels"
    if parameter.dtype not in _FLOATS:
        return f"no fused kernels for {parameter.dtype}"
    return ops.why_unsupported(backend, parameter.device)


def exact_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor | None:
    """x [..., K] @ weight [N, K].T + bias [N], a row of which has the same bits beside whatever others; None where no kernel
    gives that."""
    kernel = _exact_kernel(x, weight, bias, backend)
    if kernel is not None and autograd.wanted(x, weight, bias):
        return autograd.linear(kernel, x, weight, bias)
    return None if kernel is None else kernel(x, weight, bias)


def _exact_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Callable | None:
    run, name = _kernels("linear", backend, x.device)
    if name == "cpu":
        return run.linear if run.supports_linear(x, weight) else None
    if name == "triton":
        run, _ = _kernels("exact_linear", backend, x.device)
        return run.exact_linear if run.supports(x, weight, bias) else None
    return None


def supports_linear(weight: Tensor | QuantizedWeight, *, backend: str = "auto") -> bool:
    """Whether `linear` has a kernel for this weight, so that it does better than torch, or inside `exact` another way."""
    name = _kernels("linear", backend, weight.device)[1]
    if isinstance(weight, QuantizedWeight):
        return name in _QUANTIZED and _quantized(backend, weight.device).supports_weight(weight)
    if name == "cpu":
        return weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and is_exact()
    return name == "triton" and weight.dtype in (torch.bfloat16, torch.float16)


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = norm(x) @ weight.T + bias; then y = activation(y[..., :I]) * y[..., I:]; then y = residual + y.

    On Triton few rows take one kernel (`triton.linear` tells how it rounds a norm); else every operation has its own.

    Args:
        x: [..., K].
        weight: [N, K], with an activation [2 I, K]; bias: [N] or [2 I]. Where no kernel takes a quantized weight, it is
            dequantized for the call.
        norm: an RMS norm of x; None for none.
        activation: "silu", "gelu", "gelu_tanh"; None for none.
        residual: of the result's shape and dtype.

    Returns:
        [..., N], with an activation [..., I], a new tensor.
    """
    if residual is not None:
        _check_residual(residual, x, weight.shape[0] // (1 if activation is None else 2))
    if isinstance(weight, QuantizedWeight):
        return _quantized_linear(x, weight, bias, norm, activation, residual, backend)
    run, name = _kernels("linear", backend, x.device)
    few = name == "triton" and not is_exact() and run.supports(x, weight, bias, norm, activation)
    if name == "reference" or few:
        return run.linear(x, weight, bias, norm=norm, activation=activation, residual=residual)
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast, backend=backend)
    y = None
    if is_exact():
        y = exact_linear(x, weight, bias, backend=backend)
    elif name == "cpu" and x.dtype == torch.float32 and run.supports_linear(x, weight):
        y = run.linear(x, weight, bias)
    if y is None:
        y = F.linear(x, weight, bias)
    if activation is not None:
        y = act_and_mul(y, activation, backend=backend)
    return y if residual is None else y.add_(residual)


def rounds_to(weight: QuantizedWeight, *, backend: str = "auto") -> str | None:
    """The type that `linear` rounds inputs of this weight to: its `activations`, where the device multiplies in it."""
    return _quantized(backend, weight.device).rounds_to(weight)


def adds_in_linear(
    x: Tensor, weight: Tensor | QuantizedWeight | None = None, norm: Norm | None = None, *, backend: str = "auto"
) -> bool:
    """Whether `linear` of as many rows as x [..., K] adds a residual, and `norm` of the sum, on its way to the product with
    `weight` (None: it is not known). If not, `add_rms_norm` does both.
    """
    run, name = _kernels("linear", backend, x.device)
    if name != "triton":
        return True
    if isinstance(weight, QuantizedWeight):
        return _quantized(backend, x.device).supports(x, weight, None, norm, None)
    return run.is_few_rows(x)


def head_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [H, M, K] @ weight [H, K, N] + bias [N] -> [H, M, N]."""
    run, name = _kernels("linear", "auto", x.device)
    if name == "cpu" and run.supports_head_linear(x, weight):
        if autograd.wanted(x, weight, bias):
            return autograd.head_linear(run.head_linear, x, weight, bias)
        return run.head_linear(x, weight, bias)
    return torch.matmul(x, weight) if bias is None else torch.matmul(x, weight) + bias


def grouped_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    experts: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    max_rows: int | None = None,
    partial: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Row s of the result is x[s // k] @ weight[experts[s]].T + bias[experts[s]]; gated; times scale[s].

    Args:
        x: [R, K]; each row is used for k = S / R consecutive entries of `experts`.
        weight: [E, N, K], contiguous along K or N, with an activation [E, 2 I, K]; bias: [E, N] or [E, 2 I]. Where no
            kernel takes a quantized weight, it is dequantized for the call.
        experts: int [S], each below E.
        activation: as in `linear`.
        scale: [S]; None for none.
        max_rows: the most entries of `experts` below E that are equal; None: S. If there are more, their results may be NaN.
        partial: `experts` may be E, too, for an expert that is not there: such rows are zeros. Not of quantized weights.

    Returns:
        [S, N] or [S, I] in x's dtype, with a scale in that to which both promote.
    """
    if experts.dim() != 1 or x.dim() != 2 or len(experts) % max(len(x), 1):
        raise ValueError(f"experts {list(experts.shape)} must be [S], S a multiple of the rows of x {list(x.shape)}")
    if scale is not None and scale.shape != experts.shape:
        raise ValueError(f"scale has shape {list(scale.shape)}, experts {list(experts.shape)}")
    options = dict(activation=activation, scale=scale, max_rows=max_rows)
    if isinstance(weight, QuantizedWeight):
        if partial:
            raise ValueError("partial: quantized experts are all there")
        run = _quantized(backend, x.device)
        run = run if run.supports_grouped(x, weight, experts, bias, activation) else _dequantizing
        return run.grouped_linear(x, weight, experts, bias, **options)
    options["partial"] = partial
    if supports_grouped_linear(x, weight, experts, bias, activation=activation, backend=backend):
        return _kernels("moe", "triton", x.device)[0].grouped_linear(x, weight, experts, bias, **options)
    return _kernels("moe", "reference", x.device)[0].grouped_linear(x, weight, experts, bias, **options)


def supports_grouped_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    experts: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> bool:
    """Whether `grouped_linear` has a kernel for this call; if not, torch's grouped_mm is better."""
    if isinstance(weight, QuantizedWeight):
        run = _quantized(backend, x.device)
        return run is not _dequantizing and run.supports_grouped(x, weight, experts, bias, activation)
    if ops.resolve_backend(backend, x.device) != "triton":
        return False
    return _kernels("moe", "triton", x.device)[0].supports(x, weight, experts, bias, activation)


def moe_experts(
    x: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    experts: Tensor,
    router_weights: Tensor,
    *,
    activation: str | Callable[[Tensor], Tensor],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    after: Callable[[Tensor], Tensor] | None = None,
    partial: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Sum over a token's experts e of w_e * after(down_e(activation(gate_e(x)) * up_e(x))).

    Args:
        x: [T, H].
        gate_up: [E, 2 I, H]; down: [E, H, I]; each contiguous along one of its last two dimensions.
        experts, router_weights: [T, k]; the experts of a token differ, but for those that `partial` allows.
        activation: as in `linear`, or a function from all that gate_up gives, [S, N], to what down takes, [S, I].
        gate_up_bias: [E, 2 I]; down_bias: [E, H].
        after: a function of rows [S, H]; None for none.
        partial: as in `grouped_linear`; such experts are to have a router weight of 0.

    Returns:
        [T, H] in x's dtype. Summed in fp32, in one order.
    """
    pairs, scale = experts.reshape(-1), router_weights.reshape(-1)
    options = dict(max_rows=len(x), partial=partial, backend=backend)
    if isinstance(activation, str):
        hidden = grouped_linear(x, gate_up, pairs, gate_up_bias, activation=activation, **options)
    else:
        hidden = activation(grouped_linear(x, gate_up, pairs, gate_up_bias, **options))
    if after is None:
        weighted = grouped_linear(hidden, down, pairs, down_bias, scale=scale, **options)
    else:
        weighted = after(grouped_linear(hidden, down, pairs, down_bias, **options)) * scale[:, None]
    return weighted.view(*experts.shape, -1).sum(1).to(x.dtype)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: str = "weight_after",
    quantize: str | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm over the last dimension; with r = rsqrt(mean(x^2) + eps) in fp32:

        cast="weight_after"   (offset + weight) * (x * r).to(dtype)     Llama, Qwen, Mistral
        cast="weight_before"  ((offset + weight) * (x * r)).to(dtype)   Olmo2; Gemma with offset=1

    Args:
        x: [..., H], the last dimension contiguous; [T, heads, H] may be a view into a merged projection.
        weight: [H] of x's dtype, or None for none.
        quantize: "fp8" or "int8" for e4m3 or int8 [..., H] and scales [..., 1] fp32 whose product is the result.

    Returns:
        A new contiguous tensor of x's shape; with `quantize` (values, scales).
    """
    run, name = _kernels("elementwise", backend, x.device)
    if name != "reference" and autograd.wanted(x, weight):
        options = dict(eps=eps, offset=offset, cast=cast)
        return autograd.recomputed(partial(run.rms_norm, **options), partial(_reference.rms_norm, **options), x, weight)
    if name == "cpu":
        return _maybe_quantized(run.rms_norm(x, weight, eps, offset=offset, cast=cast), quantize)
    return run.rms_norm(x, weight, eps, offset=offset, cast=cast, quantize=quantize)


def add_rms_norm(
    x: Tensor, residual: Tensor, norm: Norm, *, quantize: str | None = None, backend: str = "auto"
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
    """(rms_norm(total), total) with total = x + residual in their dtype; x and residual [..., H]."""
    run, name = _kernels("elementwise", backend, x.device)
    if name != "reference" and autograd.wanted(x, residual, norm.weight):

        def both(function, x, residual, weight):
            return function(x, residual, norm._replace(weight=weight))

        kernel = partial(add_rms_norm, backend=backend)
        return autograd.recomputed(
            partial(both, kernel), partial(both, _reference.add_rms_norm), x, residual, norm.weight
        )
    if name == "cpu":
        total = residual + x
        normed = run.rms_norm(total, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast)
        return _maybe_quantized(normed, quantize), total
    return run.add_rms_norm(x, residual, norm, quantize=quantize)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    quantize: str | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) * rsqrt(variance + eps) * weight + bias over the last dimension of x [..., H]; on CPU torch's own."""
    run, name = _kernels("elementwise", backend, x.device)
    if name == "triton" and autograd.wanted(x, weight, bias):
        kernel, formula = (partial(home.layer_norm, eps=eps) for home in (run, _reference))
        return autograd.recomputed(kernel, formula, x, weight, bias)
    return (_reference if name == "cpu" else run).layer_norm(x, weight, bias, eps, quantize=quantize)


def act_and_mul(
    gate_up: Tensor, activation: str, *, quantize: str | None = None, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """gate_up [..., 2 I] -> activation(gate_up[..., :I]) * gate_up[..., I:], contiguous.

    Activations: "silu", "gelu" (erf), "gelu_tanh". `quantize` as in `rms_norm`.
    """
    run, name = _kernels("elementwise", backend, gate_up.device)
    if name != "reference" and autograd.wanted(gate_up):
        kernel, formula = (partial(home.act_and_mul, activation=activation) for home in (run, _reference))
        return autograd.recomputed(kernel, formula, gate_up)
    if name == "cpu":
        return _maybe_quantized(run.act_and_mul(gate_up, activation), quantize)
    return run.act_and_mul(gate_up, activation, quantize=quantize)


def rotary(
    q_THD: Tensor, k_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`x * cos + rotate_half(x) * sin` on the first R of D dimensions of every head; the rest passes through.

    Args:
        q_THD, k_THD: [T, Hq, D] and [T, Hkv, D], views with any strides over tokens and heads.
        cos_TR, sin_TR: [T, R], R even, as transformers makes them: both halves of R hold the frequencies.

    Returns:
        New contiguous q and k.
    """
    run, name = _kernels("elementwise", backend, q_THD.device)
    if name != "reference" and autograd.wanted(q_THD, k_THD):
        return autograd.recomputed(run.rotary, _reference.rotary, q_THD, k_THD, cos_TR, sin_TR)
    return run.rotary(q_THD, k_THD, cos_TR, sin_TR)


def supports_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotary` takes a batch of one: q, k [1, H, T, D] and cos, sin [1, T, R] of one dtype."""
    return (
        q.device.type in ops.OWN_BACKEND
        and q.dim() == k.dim() == 4
        and cos.dim() == 3
        and q.shape[0] == cos.shape[0] == 1
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.dtype in _FLOATS
        and q.stride(-1) == k.stride(-1) == 1
    )


def _quantized_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    norm: Norm | None,
    activation: str | None,
    residual: Tensor | None,
    backend: str,
) -> Tensor:
    """`linear`: all in one kernel where there is such a one, else each operation by itself."""
    run = _quantized(backend, x.device)
    if run.supports(x, weight, bias, norm, activation):
        return run.linear(x, weight, bias, norm=norm, activation=activation, residual=residual)
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast, backend=backend)
    plain = run if run.supports(x, weight, bias, None, None) else _dequantizing
    y = plain.linear(x, weight, bias)
    if activation is not None:
        y = act_and_mul(y, activation, backend=backend)
    return y if residual is None else y.add_(residual)


def _quantized(backend: str, device: torch.device):
    """The module that multiplies by quantized weights."""
    name = ops.resolve_backend(backend, device)
    return _kernels("quantized", backend, device)[0] if name in _QUANTIZED else _dequantizing


@cache
def _kernels(part: str, backend: str, device: torch.device):
    """(module that implements a part of a backend, the backend's name); remembered, for it is asked in every layer."""
    name = ops.resolve_backend(backend, device)
    return import_module(f".{'ref' if name == 'reference' else name}.{part}", __package__), name


def _check_residual(residual: Tensor, x: Tensor, columns: int) -> None:
    shape = (*x.shape[:-1], columns)
    if residual.shape != shape or residual.dtype != x.dtype:
        raise ValueError(f"residual must be {x.dtype} {list(shape)}, not {residual.dtype} {list(residual.shape)}")


def _maybe_quantized(result: Tensor, quantize: str | None):
    return result if quantize is None else _reference.quantized(result, quantize)
