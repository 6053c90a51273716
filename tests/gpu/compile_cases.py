"""What the compile gate compiles: launchers of every kernel on tensors of real shapes, which are never read.

Add a Case for each variant that compiles to different code and matters: head sizes, dtypes, the tiles of few and many rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import attention_calls
import dense_calls
import fp8_calls
import sampling_calls
import torch

from hf_paged_kernels import inputs, ops
from hf_paged_kernels.norm import Norm

WGMMA = {"sm_90": "HGMMA"}
TENSOR = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "mfma"}
HMMA = {"sm_80": "HMMA", "sm_90": "HMMA", "sm_100": "HMMA", "gfx942": "mfma"}
IMMA = {"sm_80": "IMMA", "sm_90": "IMMA"}
INT8 = dict(kind="int8", activations="int8")
BLOCKS = dict(block=(128, 128))
LATENT = (576, 512)  # of DeepSeek V2 and V3
NO_FP8 = {"sm_80": "it cannot convert to e4m3, and torch does"}


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        name: unique; the table's first column.
        run: calls the launcher on CPU tensors. Every launch it makes is compiled, and is a line of the table.
        mma: architecture -> instruction that must be in the machine code of one of its kernels ("HGMMA" is wgmma).
        without: architecture -> why it is not compiled there.
        without_conversions: whether NVIDIA's machine code may hold none from integers to floats.
    """

    name: str
    run: Callable[[], object]
    mma: dict[str, str] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    without_conversions: bool = False


def integers(name: str, *call, mma=TENSOR, **options) -> Case:
    """A linear layer on a weight of whole numbers."""
    return Case(name, lambda: dense_calls.quantized_linear(*call, **options), mma=mma, without_conversions=True)


def integer_experts(name: str, *call, mma=TENSOR, **options) -> Case:
    """Experts on such weights. Finding a pair's row, before the loop, is a division, which converts."""
    return Case(name, lambda: dense_calls.quantized_experts(*call, **options), mma=mma)


def copy_blocks() -> None:
    cache = ops.allocate_kv(64, 8, 128, 128, 64, torch.bfloat16, "cpu", backend="triton")
    ops.copy_blocks(*cache, torch.empty(3, 2, dtype=torch.int64), backend="triton")


def rotary_store(heads: tuple[int, int], dim: int, rotated: int, norm: bool, tokens: int = 64) -> None:
    """On views of a merged projection of `heads` query and key/value heads."""
    q_heads, kv_heads = heads
    qkv = torch.empty(tokens, (q_heads + 2 * kv_heads) * dim, dtype=torch.bfloat16)
    query, key, value = (
        part.unflatten(1, (-1, dim)) for part in qkv.split([q_heads * dim, kv_heads * dim, kv_heads * dim], 1)
    )
    angles = torch.empty(tokens, rotated, dtype=torch.bfloat16)
    norm = Norm(torch.empty(dim, dtype=torch.bfloat16), 1e-6) if norm else None
    cache = ops.allocate_kv(64, kv_heads, dim, dim, 64, torch.bfloat16, "cpu", backend="triton")
    slots = torch.empty(tokens, dtype=torch.int64)
    ops.rotary_store(query, key, value, *cache, slots, angles, angles, q_norm=norm, k_norm=norm, backend="triton")


def prepare_inputs(*, groups: int, sampled: bool) -> None:
    """A decode step of three sequences, padded to four."""
    sizes = inputs.PackedSizes(3, 3, 3, groups, 1, 8)
    long, short = dict(dtype=torch.int64), dict(dtype=torch.int32)
    out = inputs.InputBuffers(
        *(torch.empty(64, **long) for _ in range(3)), torch.empty(65, **short), torch.empty(64, **short),
        torch.empty(groups, 64, 512, **short), torch.empty(groups, 64, **long),
    )  # fmt: skip
    known = torch.empty(3, **long) if sampled else None
    packed = torch.empty(256, **short)
    inputs.prepare_inputs(packed, sizes, out, block_size=64, padded_seqs=4, sampled=known, backend="triton")


CASES = [
    Case("rotary_store 32/8 x 128", lambda: rotary_store((32, 8), 128, 128, norm=False)),
    Case("rotary_store 16/8 x 128, norms", lambda: rotary_store((16, 8), 128, 128, norm=True)),
    Case("rotary_store 9/3 x 64", lambda: rotary_store((9, 3), 64, 64, norm=False)),
    Case("rotary_store 16/2 x 256, R 64", lambda: rotary_store((16, 2), 256, 64, norm=True)),
    Case("copy_blocks", copy_blocks),
    Case("rms_norm 4096", lambda: dense_calls.rms_norm(64, 4096)),
    Case("rms_norm 16384 to fp8", lambda: dense_calls.rms_norm(64, 16384, quantize="fp8"), without=NO_FP8),
    Case("rms_norm of heads of 128", lambda: dense_calls.rms_norm(64, 16, 128, offset=1.0, cast="weight_before")),
    Case("add_rms_norm 16384", lambda: dense_calls.add_rms_norm(64, 16384)),
    Case("layer_norm 5120", lambda: dense_calls.layer_norm(64, 5120)),
    Case("act_and_mul silu 14336", lambda: dense_calls.act_and_mul(64, 14336, "silu")),
    Case("act_and_mul silu to fp8", lambda: dense_calls.act_and_mul(64, 14336, "silu", quantize="fp8"), without=NO_FP8),
    Case("act_and_mul gelu_tanh 9216", lambda: dense_calls.act_and_mul(64, 9216, "gelu_tanh")),
    Case("exact linear", lambda: dense_calls.exact_linear(16, 4096, 4096), mma=TENSOR),
    Case("exact linear, float32", lambda: dense_calls.exact_linear(300, 576, 1536, dtype=torch.float32, bias=True)),
    Case("fp8 linear norm, 4096 -> 6144", lambda: fp8_calls.linear(1, 6144, 4096, norm=True), mma=HMMA),
    Case("fp8 linear norm, silu, 14336", lambda: fp8_calls.mlp(16, 14336, 4096), mma=HMMA),
    Case("fp8 linear norm, silu, 32 rows", lambda: fp8_calls.mlp(32, 14336, 4096), mma=HMMA),
    Case("fp8 linear + residual, static", lambda: fp8_calls.linear(4, 4096, 14336, residual=True, static=True), mma=HMMA),
    Case("fp8 linear split", lambda: fp8_calls.linear(8, 576, 14336, bias=True, residual=True), mma=HMMA),
    Case("fp8 linear not rounded", lambda: fp8_calls.mlp(1, 14336, 4096, activations=None), mma=HMMA),
    Case("fp8 linear blocks", lambda: fp8_calls.linear(1, 4096, 14336, residual=True, **BLOCKS), mma=HMMA),
    Case("fp8 linear blocks, silu", lambda: fp8_calls.mlp(16, 14336, 4096, **BLOCKS), mma=HMMA),
    Case("fp8 linear blocks, ragged", lambda: fp8_calls.mlp(32, 1536, 576, **BLOCKS), mma=HMMA),
    Case("fp8 linear blocks of 64", lambda: fp8_calls.linear(1, 576, 1536, block=(64, 64)), mma=HMMA),
    Case("fp8 linear 64 rows, blocks", lambda: fp8_calls.mlp(64, 14336, 4096, **BLOCKS)),
    Case("fp8 linear 2048 rows, blocks", lambda: fp8_calls.linear(2048, 4096, 14336, residual=True, **BLOCKS)),
    Case("fp8 linear 2048 rows, blocks, silu", lambda: fp8_calls.mlp(2048, 14336, 4096, **BLOCKS)),
    Case("fp8 linear 2048 rows", lambda: fp8_calls.linear(2048, 6144, 4096, bias=True)),
    Case("fp8 experts 8 of 128", lambda: fp8_calls.experts(1, 8, 128, 2048, 768, **BLOCKS), mma=HMMA),
    Case("fp8 experts 2 of 8, 64 tokens", lambda: fp8_calls.experts(64, 2, 8, 4096, 14336), mma=HMMA),
    Case("fp8 experts, 4096 tokens", lambda: fp8_calls.experts(4096, 8, 128, 2048, 768, **BLOCKS)),
    Case("fp8 experts not rounded", lambda: fp8_calls.experts(4096, 8, 128, 2048, 768, activations=None)),
    Case("int8 experts 8 of 128", lambda: fp8_calls.experts(1, 8, 128, 2048, 768, **INT8), mma=IMMA),
    Case("int8 experts, 4096 tokens", lambda: fp8_calls.experts(4096, 8, 128, 2048, 768, **INT8)),
    Case("int8 linear norm, 4096 -> 6144", lambda: fp8_calls.linear(1, 6144, 4096, norm=True, **INT8), mma=IMMA),
    Case("int8 linear norm, silu, 32 rows", lambda: fp8_calls.mlp(32, 14336, 4096, **INT8), mma=IMMA),
    Case("int8 linear 2048 rows", lambda: fp8_calls.mlp(2048, 14336, 4096, **INT8)),
    Case("linear 1 x 4096 -> 128256", lambda: dense_calls.linear(1, 128256, 4096), mma=HMMA),
    Case("linear norm, silu, 2 x 14336", lambda: dense_calls.mlp(1, 14336, 4096, "silu"), mma=HMMA),
    Case("linear norm, gelu_tanh, 32 rows", lambda: dense_calls.mlp(32, 9216, 2304, "gelu_tanh"), mma=HMMA),
    Case("linear + residual, 3072 -> 1024", lambda: dense_calls.linear(8, 1024, 3072, residual=True), mma=HMMA),
    Case("experts 8 of 128, 2048 x 768", lambda: dense_calls.experts(1, 8, 128, 2048, 768), mma=HMMA),
    Case("experts 2 of 8, 64 tokens", lambda: dense_calls.experts(64, 2, 8, 4096, 14336), mma=HMMA),
    Case("experts 2 of 8, fp32", lambda: dense_calls.experts(4, 2, 8, 512, 1024, torch.float32)),
    Case("experts, weights along N", lambda: dense_calls.experts(8, 4, 32, 2880, 2880, transposed=True), mma=HMMA),
    Case("adapters of rank 16, qkv", lambda: dense_calls.adapters(8, 4096, (4096, 1024, 1024), 16), mma=HMMA),
    Case("adapters of rank 64, 512 rows", lambda: dense_calls.adapters(512, 4096, (14336, 14336), 64), mma=HMMA),
    Case("adapters of rank 256", lambda: dense_calls.adapters(8, 4096, (4096,), 256), mma=HMMA),
    Case("adapters, fp32", lambda: dense_calls.adapters(8, 4096, (4096,), 16, torch.float32)),
    Case("dequantize int4", lambda: dense_calls.quantized_linear(4096, "int4", 4096, 4096)),
    Case("dequantize int4 g32, zeros", lambda: dense_calls.quantized_linear(4096, "int4", 4096, 4096, group=32, zeros=True)),
    Case("dequantize int3 of odd groups", lambda: dense_calls.quantized_linear(4096, "int3", 4096, 4096, group=100)),
    Case("dequantize int8", lambda: dense_calls.quantized_linear(4096, "int8", 4096, 4096, group=4096)),
    integers("int4 4096 x 4096", 7, "int4", 4096, 4096),
    integers("int4 norm, silu, 2 x 14336", 1, "int4", 14336, 4096, norm=True, activation="silu"),
    integers("int4 g32, zeros, 32 rows, norm", 32, "int4", 6144, 4096, group=32, zeros=True, norm=True),
    integers("int4 perm + residual, fp16", 16, "int4", 4096, 14336, perm=True, residual=True, dtype=torch.float16),
    integers("int4 64 rows", 64, "int4", 4096, 4096),
    integers("int4 256 rows, zeros", 256, "int4", 6144, 4096, zeros=True),
    integers("int3 zeros", 4, "int3", 4096, 4096, zeros=True),
    integers("int2 g64", 4, "int2", 4096, 4096, group=64),
    integers("int8 norm", 4, "int8", 4096, 4096, group=4096, norm=True, mma=HMMA),
    integers("int8 g128, zeros, fp16", 8, "int8", 4096, 4096, zeros=True, dtype=torch.float16, mma=HMMA),
    integer_experts("experts int4, 8 of 128", 1, 8, 128, "int4", 2048, 768),
    integer_experts("experts int4 g32, zeros, 64 tokens", 64, 2, 8, "int4", 4096, 14336, group=32, zeros=True),
    integer_experts("experts int4, 1024 tokens", 1024, 2, 8, "int4", 4096, 14336),
    integer_experts("experts int8", 4, 2, 8, "int8", 4096, 14336, mma=HMMA),
    integers("int8 128 rows", 128, "int8", 4096, 4096, group=4096),
    Case("rotary 32/8 x 128, R 64", lambda: dense_calls.rotary(32, 8, 128, 64)),
    Case("argmax of 4 rows", lambda: sampling_calls.argmax(4)),
    Case("argmax of 1024 rows", lambda: sampling_calls.argmax(1024)),
    Case("sample bf16, seeds", lambda: sampling_calls.sample(4, torch.bfloat16, counter=True)),
    Case("sample fp32, uniforms", lambda: sampling_calls.sample(256, torch.float32, counter=False)),
    Case("penalties", sampling_calls.penalize),
    Case("prepare_inputs", lambda: prepare_inputs(groups=1, sampled=False)),
    Case("prepare_inputs, sampled", lambda: prepare_inputs(groups=3, sampled=True)),
    Case("attention D 64", lambda: attention_calls.attention(8, 4, dims=(64, 64)), WGMMA),
    Case("attention D 128", lambda: attention_calls.attention(8, 4), WGMMA),
    Case("attention D 256", lambda: attention_calls.attention(8, 4, (8, 1), (256, 256), window=1000, softcap=50.0), WGMMA),
    Case("images D 256", lambda: attention_calls.attention(8, 4, (8, 4), (256, 256), window=1024, ends=True), WGMMA),
    Case("attention fp8 cache", lambda: attention_calls.attention(8, 4, kv_dtype=torch.float8_e4m3fn), WGMMA, NO_FP8),
    Case("attention int8 cache", lambda: attention_calls.attention(8, 4, kv_dtype=torch.int8), WGMMA),
    Case("attention fp32", lambda: attention_calls.attention(8, 4, dtype=torch.float32)),
    Case("attention blocks of 16", lambda: attention_calls.attention(8, 4, block_size=16, window=1000), WGMMA),
    Case("attention exact, window", lambda: attention_calls.exact(8, 4, window=1000), WGMMA),
    Case("attention D 512", lambda: attention_calls.attention(8, 4, (8, 1), (512, 512)), HMMA),
    Case("latents 16/1", lambda: attention_calls.attention(8, 4, (16, 1), LATENT, values_in_keys=True), WGMMA),
    Case("latents 128/1", lambda: attention_calls.attention(8, 4, (128, 1), LATENT, values_in_keys=True), WGMMA),
    Case("shared prefixes D 64", lambda: attention_calls.attention(64, 0, (32, 8), (64, 64), shared=True)),
    Case("shared prefixes D 128", lambda: attention_calls.attention(64, 0, shared=True), WGMMA),
]
