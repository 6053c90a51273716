"""Linear layers and experts on quantized weights against the reference in float32, and the engine on such models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

import hf_paged
from hf_paged.quant.linear import QuantLinear
from hf_paged_kernels import fused
from hf_paged_kernels.norm import Norm
from hf_paged_kernels.quantized import QuantizedWeight

from .batches import randn
from .check_engine import (
    differing,
    engine_on,
    engine_tokens,
    forced_logits,
    forced_sequences,
    forward_logits,
    stock_tokens,
    tiny,
)  # fmt: skip
from .checking import BOUNDS, Case, Setting, compare, guarded
from .models import LLAMA_8B
from .quantized_weights import Scheme, random_weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6
MOST = {  # with everything that can be fused into them
    "int4": Scheme("int4", (1, 128)),
    "fp8": Scheme("fp8", activations="fp8"),
    "fp8, blocks": Scheme("fp8", (128, 128), activations="fp8"),
}
OTHERS = {
    "int4, zeros, g32": Scheme("int4", (1, 32), zeros=True),
    "int4, act-order": Scheme("int4", (1, 128), zeros=True, perm=True),
    "int4, one group": Scheme("int4"),
    "int3": Scheme("int3", (1, 64), zeros=True),
    "int2": Scheme("int2", (1, 32), zeros=True),
    "int8": Scheme("int8"),
    "int8, zeros, g128": Scheme("int8", (1, 128), zeros=True),
    "int8, W8A8": Scheme("int8", activations="int8"),
    "fp8, weight only": Scheme("fp8"),
    "fp8, one scale, static": Scheme("fp8", (0, 0), activations="fp8", static=True),
}
GATED = 2  # times the bound: a product of two results that are rounded
# Root mean square of the error as a share of the result's, where last bits decide which way inputs of a product are rounded
# to 8 bits: after a norm, in the second product of experts, in a whole model.
REROUNDED, REROUNDED_MODEL = 0.05, 0.1


def linear(setting: Setting) -> Iterator[Case]:
    """Products of few and of many rows, plain and with everything that can be fused into them."""
    shapes = LLAMA_8B.linears()
    sizes = {"small": (160, 256)} if setting.small else {name: shapes[name] for name in ("qkv", "down")}
    counts = (3,) if setting.small else (1, 16, 300)
    for label, scheme in (MOST | OTHERS).items():
        for name, (rows, columns) in sizes.items():
            weight = random_weight(scheme, rows, columns, setting.device, seed=1)
            every = _calls(setting, rows, columns)
            calls = every if label in MOST else dict(list(every.items())[1:2])
            for count in counts if label in MOST else counts[:2]:
                for call, options in calls.items():
                    yield _linear(f"{label}, {name}, {count} rows, {call}", setting, weight, count, BF16, options)
    for dtype in (FP32,) if setting.small else (FP16, FP32):
        weight = random_weight(MOST["int4"], *next(iter(sizes.values())), setting.device, seed=2)
        yield _linear(f"int4, {dtype}", setting, weight, counts[0], dtype, {})


def _calls(setting: Setting, rows: int, columns: int) -> dict[str, dict]:
    bias = randn(rows, dtype=BF16, device=setting.device, seed=2)
    norm = Norm(randn(columns, dtype=BF16, device=setting.device, seed=3), EPS)
    return {
        "plain": {},
        "bias, residual": dict(bias=bias, residual=True),
        "norm, silu": dict(norm=norm, activation="silu"),
    }


@guarded
def _linear(
    name: str, setting: Setting, weight: QuantizedWeight, count: int, dtype: torch.dtype, options: dict
) -> Case:
    rows, columns = weight.shape
    x = randn(count, columns, dtype=dtype, device=setting.device, seed=4)
    if options.get("residual"):
        options = options | dict(residual=randn(count, rows, dtype=dtype, device=setting.device, seed=5))
    got = fused.linear(x, weight, **options, backend=setting.backend)
    seen = _as_seen(weight, setting)
    expected = fused.linear(x.float(), seen, **{key: _wide(value) for key, value in options.items()}, backend="reference")
    if seen.activations and "norm" in options:
        return _rerounded(name, got, expected, REROUNDED)
    return compare(name, got, expected, dtype, BOUNDS[dtype] * (GATED if "activation" in options else 1))


def _as_seen(weight: QuantizedWeight, setting: Setting) -> QuantizedWeight:
    """A GPU that cannot multiply fp8 does not round inputs to it."""
    if weight.activations is None or setting.backend != "triton":
        return weight
    from hf_paged_kernels.triton.fp8_linear import rounds_to

    activations = rounds_to(weight, setting.device)
    return replace(weight, activations=activations, input_scale=weight.input_scale if activations else None)


def _wide(value):
    if isinstance(value, Norm):
        return value._replace(weight=value.weight.float())
    return value.float() if isinstance(value, Tensor) else value


def experts(setting: Setting) -> Iterator[Case]:
    """Mixtures of experts of few and of many tokens."""
    shapes = {"small": (4, 2, 128, 128)} if setting.small else {
        "Qwen3-30B": (128, 8, 2048, 768), "Mixtral": (8, 2, 4096, 14336),
    }  # experts, of them per token, width, width of an expert  # fmt: skip
    schemes = MOST | {"int8": OTHERS["int8"]}
    for label, scheme in list(schemes.items())[:2] if setting.small else schemes.items():
        for name, (count, chosen, width, inner) in shapes.items():
            gate_up = random_weight(scheme, 2 * inner, width, setting.device, seed=1, experts=count)
            down = random_weight(scheme, width, inner, setting.device, seed=2, experts=count)
            for tokens in (3,) if setting.small else (1, 64):
                yield _experts(f"{label}, {name}, {tokens} tokens", setting, gate_up, down, chosen, tokens)


@guarded
def _experts(
    name: str, setting: Setting, gate_up: QuantizedWeight, down: QuantizedWeight, chosen: int, tokens: int
) -> Case:
    x = randn(tokens, gate_up.in_features, dtype=BF16, device=setting.device, seed=3)
    scores = randn(tokens, len(gate_up.data), dtype=FP32, device=setting.device, seed=4)
    weights, ids = scores.softmax(-1).topk(chosen, dim=-1)
    got = fused.moe_experts(x, gate_up, down, ids, weights, activation="silu", backend=setting.backend)
    wide = _as_seen(gate_up, setting), _as_seen(down, setting)
    expected = fused.moe_experts(x.float(), *wide, ids, weights, activation="silu", backend="reference")
    if wide[0].activations:
        return _rerounded(name, got, expected, REROUNDED)
    return compare(name, got, expected, BF16, BOUNDS[BF16] * GATED)


def engine(setting: Setting) -> Iterator[Case]:
    """A model quantized on the spot says what its dequantized copy says under stock; with inputs in fp8, nearly so."""
    for family in ("llama",) if setting.small else ("llama", "gemma3_text"):
        for kind in ("int4", "fp8") if setting.small else ("int4", "int8", "fp8"):
            yield _engine(f"{family}, {kind}", setting, family, kind)


@guarded
def _engine(name: str, setting: Setting, family: str, kind: str) -> Case:
    model = tiny(family, setting)
    hf_paged.unpatch(hf_paged.patch(model, quantization=kind, attention_backend=setting.backend))
    plain = dequantized(model)
    if kind != "fp8":
        expected = stock_tokens(plain, setting)
        with engine_on(model, setting) as running:
            return differing(name, engine_tokens(running, setting), expected)
    sequences, lengths = forced_sequences(setting)
    expected = forward_logits(plain, sequences, lengths)
    with engine_on(model, setting) as running:
        got = forced_logits(running, sequences, lengths)
    return _rerounded(name, got, expected, REROUNDED_MODEL)


def _rerounded(name: str, got: Tensor, expected: Tensor, bound: float) -> Case:
    return Case(name, float((got.float() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()), bound)


def dequantized(model: nn.Module) -> nn.Module:
    """A copy with plain linear layers of the weights that the quantized ones stand for."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            weight = layer.dequantize(model.dtype)
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            model.set_submodule(name, plain)
    return model


AREAS = {"quantized-linear": linear, "quantized-experts": experts, "quantized-engine": engine}
