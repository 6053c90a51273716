"""Norms, activations, rotary embedding, the KV write and linear layers against the reference in float32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_paged_kernels import fused, ops
from hf_paged_kernels.norm import Norm

from .batches import randn
from .check_attention import BF16, FP16, FP32
from .checking import BOUNDS, Case, Setting, compare, guarded
from .models import LLAMA_8B, QWEN3_06B

EPS = 1e-6
WIDTHS = (1024, 2880, 4096, 5376, 16384)  # Qwen3-0.6B, GPT-OSS, Llama-8B, Gemma 3 27B, Llama-405B
FP8_BOUND = 0.07  # e4m3 is off by up to 2^-4 of a value
RESIDUALS = {"weight_after": 0.0, "weight_before": 1.0}  # where a norm rounds -> what it adds to its weight


def norms(setting: Setting) -> Iterator[Case]:
    """RMS norms of rows and of heads in a merged projection, with and without a residual, and layer norms."""
    rows, widths = (3, (48, 96)) if setting.small else (1031, WIDTHS)
    for dtype in (BF16, FP32) if setting.small else (BF16, FP16, FP32):
        for width in widths if dtype == BF16 else widths[1:2]:
            x, residual = (_randn(setting, rows, width, dtype=dtype, seed=i) for i in (1, 2))
            weight, bias = (_randn(setting, width, dtype=dtype, seed=i) for i in (3, 4))
            for cast, offset in RESIDUALS.items():
                norm = Norm(weight, EPS, offset, cast)
                yield _both(f"rms_norm {cast}, {width}, {dtype}", setting, dtype, _rms_norm, x, norm)
                yield _both(f"add_rms_norm {cast}, {width}, {dtype}", setting, dtype, _add_rms_norm, x, residual, norm)
            yield _both(f"layer_norm {width}, {dtype}", setting, dtype, fused.layer_norm, x, weight, bias, EPS)
    heads = _randn(setting, 7 if setting.small else 513, 12, 128, dtype=BF16, seed=5)[:, 2:9]
    norm = Norm(_randn(setting, 128, dtype=BF16, seed=6), EPS)
    yield _both("rms_norm of heads", setting, BF16, _rms_norm, heads, norm)


def norms_to_fp8(setting: Setting) -> Iterator[Case]:
    rows, width = (3, 96) if setting.small else (1031, 4096)
    x, residual = (_randn(setting, rows, width, dtype=BF16, seed=i) for i in (1, 2))
    norm = Norm(_randn(setting, width, dtype=BF16, seed=3), EPS)
    calls = {
        "rms_norm": (lambda x, **to: fused.rms_norm(x, norm.weight, EPS, **to), x),
        "add_rms_norm": (lambda x, **to: fused.add_rms_norm(x, residual.to(x.dtype), norm, **to)[0], x),
        "layer_norm": (lambda x, **to: fused.layer_norm(x, norm.weight, None, EPS, **to), x),
        "act_and_mul": (lambda x, **to: fused.act_and_mul(x, "silu", **to), x),
    }
    for name, (call, x) in calls.items():
        expected = call(x, backend="reference")
        codes, scale = call(x, quantize="fp8", backend=setting.backend)
        yield compare(f"{name} to fp8", codes.float() * scale, expected, BF16, FP8_BOUND)
        largest = expected.float().abs().amax(-1, keepdim=True)
        yield compare(f"{name}: scale", scale, largest / 448, BF16)


def activations(setting: Setting) -> Iterator[Case]:
    rows, widths = (3, (48,)) if setting.small else (1031, (3072, 14336, 2880))
    for dtype in (BF16, FP32) if setting.small else (BF16, FP16, FP32):
        for width in widths if dtype == BF16 else widths[:1]:
            for name in ("silu", "gelu", "gelu_tanh"):
                x = _randn(setting, rows, 2 * width, dtype=dtype, seed=1)
                yield _both(f"{name} and mul, {width}, {dtype}", setting, dtype, fused.act_and_mul, x, name)


def rotary(setting: Setting) -> Iterator[Case]:
    """Rotary embedding alone, and with the norms of heads and the write to the cache; part of a head may be rotated."""
    tokens = 5 if setting.small else 1031
    shapes = {"small": (4, 2, 64, 64)} if setting.small else {
        "Llama-8B": (32, 8, 128, 128), "Qwen3-0.6B": (16, 8, 128, 128), "Phi-3 (96)": (32, 32, 96, 96),
        "Gemma 3 (256)": (8, 4, 256, 256), "half of 64": (16, 16, 64, 32),
    }  # fmt: skip
    for dtype in (BF16, FP32):
        for name, (heads, kv_heads, dim, rotated) in shapes.items():
            merged = _randn(setting, tokens, heads + 2 * kv_heads, dim, dtype=dtype, seed=1)
            query, key, value = merged.split([heads, kv_heads, kv_heads], dim=1)
            cos, sin = _angles(setting, tokens, rotated, dtype)
            yield _both(f"rotary, {name}, {dtype}", setting, dtype, _rotary, query, key, cos, sin)
            norm = Norm(_randn(setting, dim, dtype=dtype, seed=2), EPS)
            for label, q_norm in (("", None), (" with norms", norm)):
                got = _rotary_store(setting, setting.backend, query, key, value, cos, sin, q_norm)
                expected = _rotary_store(setting, "reference", *_wide(query, key, value, cos, sin, q_norm))
                for what, *pair in zip(("query", "keys", "values"), got, expected, strict=True):
                    # Two terms are rounded, of which little may be left when they are added.
                    yield compare(f"rotary_store{label}, {what}, {name}, {dtype}", *pair, dtype, 2.5 * BOUNDS[dtype])


def linear(setting: Setting) -> Iterator[Case]:
    """Products of few and of many rows, plain and with everything that can be fused into them."""
    shapes = {"small": (96, 64)} if setting.small else {
        f"{shape.name} {name}": sizes for shape in (LLAMA_8B, QWEN3_06B) for name, sizes in shape.linears().items()
    }  # fmt: skip
    for dtype in (BF16,) if setting.small else (BF16, FP16, FP32):
        for name, (rows, columns) in shapes.items() if dtype == BF16 else list(shapes.items())[-4:]:
            weight = _randn(setting, rows, columns, dtype=dtype, seed=1) * columns**-0.5
            bias = _randn(setting, rows, dtype=dtype, seed=2)
            norm = Norm(_randn(setting, columns, dtype=dtype, seed=3), EPS)
            for count in (1, 3) if setting.small else (1, 2, 8, 31, 64, 300):
                x = _randn(setting, count, columns, dtype=dtype, seed=4)
                residual = _randn(setting, count, rows, dtype=dtype, seed=5)
                calls = {"plain": {}, "bias, residual": dict(bias=bias, residual=residual), "norm": dict(norm=norm),
                         "norm, silu": dict(norm=norm, activation="silu")}  # fmt: skip
                for label, options in calls.items():
                    case = f"{name}, {count} rows, {label}, {dtype}"
                    yield _both(case, setting, dtype, fused.linear, x, weight, **options)


def experts(setting: Setting) -> Iterator[Case]:
    """Mixtures of experts of few and of many tokens, with every expert or a few of them in use."""
    shapes = {"small": (4, 2, 32, 48)} if setting.small else {
        "Qwen3-30B": (128, 8, 2048, 768), "GPT-OSS-20B": (32, 4, 2880, 2880), "Mixtral": (8, 2, 4096, 14336),
    }  # experts, of them per token, width, width of an expert  # fmt: skip
    for name, (count, chosen, width, inner) in shapes.items():
        gate_up = _randn(setting, count, 2 * inner, width, dtype=BF16, seed=1) * width**-0.5
        down = _randn(setting, count, width, inner, dtype=BF16, seed=2) * inner**-0.5
        for tokens in (1, 3) if setting.small else (1, 7, 64, 500):
            x = _randn(setting, tokens, width, dtype=BF16, seed=3)
            scores = _randn(setting, tokens, count, dtype=FP32, seed=4)
            weights, ids = scores.softmax(-1).topk(chosen, dim=-1)
            yield _both(f"{name}, {tokens} tokens", setting, BF16, fused.moe_experts, x, gate_up, down, ids, weights,
                        activation="silu")  # fmt: skip


AREAS = {
    "norms": norms,
    "norms-fp8": norms_to_fp8,
    "activations": activations,
    "rotary": rotary,
    "linear": linear,
    "experts": experts,
}


@guarded
def _both(name: str, setting: Setting, dtype: torch.dtype, call, *arguments, **options) -> Case:
    """`call` with the backend under test against the reference on the same numbers in float32."""
    got = call(*arguments, **options, backend=setting.backend)
    wide = dict(zip(options, _wide(*options.values()), strict=True))
    expected = call(*_wide(*arguments), **wide, backend="reference")
    if isinstance(got, Tensor):
        return compare(name, got, expected, dtype)
    worst = max((compare(name, *pair, dtype) for pair in zip(got, expected, strict=True)), key=lambda case: case.used)
    return worst


def _wide(*values) -> list:
    """Tensors, and those of norms, in float32."""
    return [
        value.float() if isinstance(value, Tensor) and value.is_floating_point()
        else value._replace(weight=value.weight.float()) if isinstance(value, Norm) else value
        for value in values
    ]  # fmt: skip


def _rms_norm(x: Tensor, norm: Norm, backend: str) -> Tensor:
    return fused.rms_norm(x, norm.weight, norm.eps, offset=norm.offset, cast=norm.cast, backend=backend)


def _add_rms_norm(x: Tensor, residual: Tensor, norm: Norm, backend: str) -> tuple[Tensor, Tensor]:
    return fused.add_rms_norm(x, residual, norm, backend=backend)


def _rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return fused.rotary(query, key, cos, sin, backend=backend)


def _rotary_store(setting: Setting, backend: str, query, key, value, cos, sin, norm) -> list[Tensor]:
    """The query, and what was written to the cache; tokens are scattered over it."""
    tokens, heads, dim = key.shape
    blocks = -(-2 * tokens // 16)
    caches = ops.allocate_kv(blocks, heads, dim, dim, 16, key.dtype, setting.device, backend=setting.backend)
    order = torch.randperm(blocks * 16, generator=torch.Generator().manual_seed(3)).to(setting.device)
    slots = order[:tokens].contiguous()
    slots[::5] = -1
    out = ops.rotary_store(query, key, value, *caches, slots, cos, sin, q_norm=norm, k_norm=norm, backend=backend)
    written = slots[slots >= 0]
    stored = [caches[0].transpose(2, 3), caches[1]]
    return [out, *(part[written // 16, :, written % 16] for part in stored)]


def _angles(setting: Setting, tokens: int, rotated: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, rotated] of far positions, as transformers makes them."""
    inverse = 10000.0 ** (-torch.arange(0, rotated, 2, device=setting.device) / rotated)
    angles = (torch.arange(tokens, device=setting.device) * 31)[:, None] * inverse
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _randn(setting: Setting, *shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return randn(*shape, dtype=dtype, device=setting.device, seed=seed)
