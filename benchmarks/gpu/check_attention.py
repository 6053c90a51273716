"""Paged attention and what writes the cache, on batches like those of known models, against float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_paged_kernels import AttentionMetadata, ops
from hf_paged_kernels.ref import attention as reference

from .batches import Heads, metadata, num_blocks, randn
from .checking import Case, Setting, compare, equal, guarded

LLAMA_8B, QWEN3_06B = Heads(32, 8, 128, 128), Heads(16, 8, 128, 128)
GEMMA3_4B, GEMMA2_9B = Heads(8, 4, 256, 256), Heads(16, 8, 256, 256)
GPT_OSS, GPT2, PHI3 = Heads(64, 8, 64, 64), Heads(12, 12, 64, 64), Heads(32, 32, 96, 96)
SMALL = Heads(4, 2, 64, 64)
NAMES = ("keys", "values")
# A value is off by up to 2^-4 of itself in e4m3, by up to 1/254 of its row's largest in int8.
EIGHT_BITS = {torch.float8_e4m3fn: 0.07, torch.int8: 0.03}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

Lengths = tuple[list[int], list[int]]  # (new tokens, all tokens) of each sequence


def decode(count: int, length: int) -> Lengths:
    return [1] * count, [length] * count


def ragged(count: int, longest: int) -> Lengths:
    """Single tokens on contexts from 1 to `longest`."""
    return [1] * count, [1 + (longest - 1) * (i * i) // max(1, (count - 1) ** 2) for i in range(count)]


# A step of the engine: decodes first, then a whole prompt, a prompt's later chunk, and pieces shorter than a tile.
MIXED: Lengths = ([1, 1, 1, 700, 512, 17, 2], [4000, 1, 64, 700, 4608, 80, 130])
SMALL_MIXED: Lengths = ([1, 1, 20, 9], [70, 1, 20, 41])


def attention_decode(setting: Setting) -> Iterator[Case]:
    if setting.small:
        for dtype in (FP32, BF16):
            yield attention("small, 1 to 90", SMALL, ragged(3, 90), dtype, setting, block_size=16)
        return
    for name, heads in {"Llama-8B": LLAMA_8B, "Qwen3-0.6B": QWEN3_06B}.items():
        for count, length in ((1, 1024), (1, 32768), (8, 4096), (8, 32768), (64, 1024)):
            yield attention(f"{name}, {count} x {length}, bf16", heads, decode(count, length), BF16, setting)
        yield attention(f"{name}, 256 of 1 to 2048, bf16", heads, ragged(256, 2048), BF16, setting)
    for dtype in (FP16, FP32):
        yield attention(f"Llama-8B, 16 of 1 to 8192, {dtype}", LLAMA_8B, ragged(16, 8192), dtype, setting)
    for name, heads in {"GPT-2": GPT2, "Phi-3": PHI3, "Gemma 2": GEMMA2_9B, "GPT-OSS": GPT_OSS}.items():
        yield attention(f"{name}, 16 of 1 to 4096, bf16", heads, ragged(16, 4096), BF16, setting)
    yield attention("Llama-8B, blocks of 16", LLAMA_8B, ragged(16, 2048), BF16, setting, block_size=16)


def attention_prefill(setting: Setting) -> Iterator[Case]:
    if setting.small:
        for dtype in (FP32, BF16):
            yield attention(f"small, mixed, {dtype}", SMALL, SMALL_MIXED, dtype, setting, block_size=16)
        return
    for name, heads in {"Llama-8B": LLAMA_8B, "Qwen3-0.6B": QWEN3_06B, "Gemma 2": GEMMA2_9B, "Phi-3": PHI3}.items():
        yield attention(f"{name}, 1 x 8192, bf16", heads, ([8192], [8192]), BF16, setting)
        yield attention(f"{name}, mixed, bf16", heads, MIXED, BF16, setting)
    yield attention("Llama-8B, 512 of 32768, bf16", LLAMA_8B, ([512], [32768]), BF16, setting)
    for dtype in (FP16, FP32):
        yield attention(f"Llama-8B, mixed, {dtype}", LLAMA_8B, MIXED, dtype, setting)
        yield attention(f"GPT-2, mixed, {dtype}", GPT2, MIXED, dtype, setting)
    yield attention("Llama-8B, mixed, blocks of 16", LLAMA_8B, MIXED, BF16, setting, block_size=16)


def attention_latent(setting: Setting) -> Iterator[Case]:
    """Multi-head latent attention: one key a token for all heads, whose first part is the value, held once."""
    if setting.small:
        yield attention("small, decode", Heads(4, 1, 40, 32), ragged(3, 70), BF16, setting, block_size=16)
        yield attention("small, mixed", Heads(4, 1, 40, 32), SMALL_MIXED, BF16, setting, block_size=16)
        return
    for name, heads in {"DeepSeek V3": Heads(128, 1, 576, 512), "DeepSeek V2 Lite": Heads(16, 1, 576, 512)}.items():
        for batch, lengths in {
            "1 x 32768": decode(1, 32768), "8 x 4096": decode(8, 4096), "64 of 1 to 4096": ragged(64, 4096),
            "2048 of 2048": ([2048], [2048]), "mixed": MIXED,
        }.items():  # fmt: skip
            yield attention(f"{name}, {batch}", heads, lengths, BF16, setting)
    for dtype in (FP16, FP32):
        yield attention(f"DeepSeek V2 Lite, mixed, {dtype}", Heads(16, 1, 576, 512), MIXED, dtype, setting)


def attention_options(setting: Setting) -> Iterator[Case]:
    """Everything a layer may ask for beyond plain causal attention, in decodes and in a mixed step."""
    slopes = torch.tensor([2 ** (-8 * (i + 1) / 32) for i in range(32)])
    sinks = randn(64, dtype=FP32, device="cpu", seed=9)
    if setting.small:
        batches = {"decode": ragged(3, 70), "mixed": SMALL_MIXED}
        layers = {
            "window": (SMALL, dict(window=19)),
            "window, sinks": (SMALL, dict(window=20, sinks=sinks[:4])),
            "softcap": (SMALL, dict(softcap=5.0)),
            "ALiBi": (SMALL, dict(alibi_slopes=slopes[:4])),
            "chunks": (SMALL, dict(chunk=24)),
        }
    else:
        batches = {"decode": ragged(16, 8192), "mixed": MIXED}
        layers = {
            "Gemma 3 (window 1024)": (GEMMA3_4B, dict(window=1024)),
            "Mistral (window 4096)": (LLAMA_8B, dict(window=4096)),
            "GPT-OSS (window 128, sinks)": (GPT_OSS, dict(window=128, sinks=sinks)),
            "GPT-OSS (sinks)": (GPT_OSS, dict(sinks=sinks)),
            "Gemma 2 (softcap 50)": (GEMMA2_9B, dict(softcap=50.0)),
            "BLOOM (ALiBi)": (Heads(32, 32, 128, 128), dict(alibi_slopes=slopes)),
            "Llama 4 (chunks of 1024)": (Heads(40, 8, 128, 128), dict(chunk=1024)),
        }
    for layer, (heads, options) in layers.items():
        moved = {
            key: value.to(setting.device) if isinstance(value, Tensor) else value for key, value in options.items()
        }
        for batch, lengths in batches.items():
            size = 16 if setting.small else 64
            yield attention(f"{layer}, {batch}", heads, lengths, BF16, setting, block_size=size, **moved)


def attention_quantized(setting: Setting) -> Iterator[Case]:
    """fp8 and int8 caches: what is written, and attention over what was read back, in decodes and a mixed step."""
    layers = {"small": SMALL} if setting.small else {"Llama-8B": LLAMA_8B, "GPT-2": GPT2, "Gemma 2": GEMMA2_9B}
    batches = {"decode": ragged(3, 70), "mixed": SMALL_MIXED} if setting.small else {
        "decode": ragged(64, 8192), "mixed": MIXED}  # fmt: skip
    for dtype in (torch.float8_e4m3fn, torch.int8):
        if reason := ops.why_unsupported(setting.backend, setting.device, kv_dtype=dtype):
            print(f"     not checked: {dtype} caches: {reason}")
            continue
        for layer, heads in layers.items():
            for batch, lengths in batches.items():
                name = f"{layer}, {batch}, {str(dtype).removeprefix('torch.')}"
                yield from _quantized_case(name, heads, lengths, dtype, setting)


def _quantized_case(name: str, heads: Heads, lengths: Lengths, dtype: torch.dtype, setting: Setting) -> Iterator[Case]:
    size = 16 if setting.small else 64
    step, new = metadata(*lengths, size, setting.device), sum(lengths[0])
    caches = random_caches(heads, num_blocks(lengths[1], size), size, dtype, setting, seed=1)
    scales = ops.allocate_scales(caches[1])
    for seed, scale in enumerate(scales):
        scale.uniform_(0.5, 2, generator=torch.Generator(setting.device).manual_seed(seed))
    query, key, value = _new_rows(heads, new, BF16, setting)
    own = [tensor.clone() for tensor in (*caches, *scales)]
    options = dict(scale=heads.key_dim**-0.5)
    expected = reference.attention_(
        *(row.float() for row in (query, key, value)), *own[:2], step, **options, k_scale=own[2], v_scale=own[3]
    )
    got = ops.attention_(
        query, key, value, *caches, step, **options, k_scale=scales[0], v_scale=scales[1], backend=setting.backend
    )
    yield compare(name, got, expected, BF16)
    block, offset = step.slot_mapping // size, step.slot_mapping % size
    for what, row, cache, scale in zip(NAMES, (key, value), (caches[0].mT, caches[1]), scales, strict=True):
        stored = cache[block, :, offset].float() * scale[block, :, offset][..., None]
        yield compare(f"{name}: {what} written", stored, row, BF16, EIGHT_BITS[dtype])


def padding(setting: Setting) -> Iterator[Case]:
    """Rows that a CUDA graph has beyond the batch: their results are zeros, and nothing is written for them."""
    heads, size = (SMALL, 16) if setting.small else (LLAMA_8B, 64)
    real = 3
    step = metadata([1] * (2 * real), [70, 5, 33] + [1] * real, size, setting.device)
    step.seq_lens[real:] = 0
    step.slot_mapping[real:] = -1
    step.block_table[real:] = -1
    caches = random_caches(heads, int(step.block_table.max()) + 4, size, BF16, setting, seed=1)
    before = [cache.clone() for cache in caches]
    rows = _new_rows(heads, 2 * real, BF16, setting)
    out = ops.attention_(*rows, *caches, step, scale=heads.key_dim**-0.5, backend=setting.backend)
    reference.store_kv(*rows[1:], *before, step.slot_mapping)
    yield equal("results", out[real:], torch.zeros_like(out[real:]))
    yield from (equal(name, *pair) for name, *pair in zip(NAMES, caches, before))


def cache_writes(setting: Setting) -> Iterator[Case]:
    """What is stored and copied has the same bits, and nothing else is touched."""
    heads, length, size = (SMALL, 70, 16) if setting.small else (LLAMA_8B, 5000, 64)
    for dtype in (BF16, FP32):
        step = metadata([length], [length + 3], size, setting.device)
        step.slot_mapping[::7] = -1  # not written
        blocks = num_blocks([length + 3], size)
        caches = random_caches(heads, blocks, size, dtype, setting, seed=1)
        expected = [cache.clone() for cache in caches]
        _, key, value = _new_rows(heads, length, dtype, setting)
        reference.store_kv(key, value, *expected, step.slot_mapping)
        ops.store_kv(key, value, *caches, step.slot_mapping, backend=setting.backend)
        yield from (equal(f"store_kv, {name}, {dtype}", *pair) for name, *pair in zip(NAMES, caches, expected))
        pairs = torch.arange(2 * (blocks // 2), device=setting.device).view(2, -1).T.contiguous()
        reference.copy_blocks(*expected, pairs)
        ops.copy_blocks(*caches, pairs, backend=setting.backend)
        yield from (equal(f"copy_blocks, {name}, {dtype}", *pair) for name, *pair in zip(NAMES, caches, expected))


AREAS = {
    "cache": cache_writes,
    "attention-decode": attention_decode,
    "attention-prefill": attention_prefill,
    "attention-options": attention_options,
    "attention-latent": attention_latent,
    "attention-quantized": attention_quantized,
    "attention-padding": padding,
}


@guarded
def attention(
    name: str, heads: Heads, lengths: Lengths, dtype: torch.dtype, setting: Setting, *, block_size: int = 64, **options
) -> Case:
    """One call that stores a step's keys and values and attends; sums in the logarithm too. Unseen slots hold NaN."""
    query_lens, seq_lens = lengths
    device, tokens = setting.device, sum(query_lens)
    step = metadata(query_lens, seq_lens, block_size, device)
    caches = random_caches(heads, num_blocks(seq_lens, block_size), block_size, dtype, setting, seed=1)
    hide_unseen(caches, step, query_lens, block_size)
    rows = _new_rows(heads, tokens, dtype, setting)
    options["scale"] = heads.key_dim**-0.5
    sums, expected_sums = torch.empty(2, tokens, heads.query, device=device)
    exact = [tensor.float() for tensor in (*rows, *caches)]
    expected = reference.attention_(*exact, step, **options, lse=expected_sums)
    del exact
    got = ops.attention_(*rows, *caches, step, **options, lse=sums, backend=setting.backend)
    results = (compare(name, got, expected, dtype), compare(f"{name}: lse", sums, expected_sums, dtype))
    return max(results, key=lambda case: case.used)


def _new_rows(heads: Heads, tokens: int, dtype: torch.dtype, setting: Setting) -> list[Tensor]:
    """Query, key and value of a step."""
    shapes = ((heads.query, heads.key_dim), (heads.key_value, heads.key_dim), (heads.key_value, heads.value_dim))
    rows = [randn(tokens, *shape, dtype=dtype, device=setting.device, seed=2 + i) for i, shape in enumerate(shapes)]
    return [*rows[:2], rows[1][..., : heads.value_dim]] if heads.latent else rows


def random_caches(
    heads: Heads, blocks: int, block_size: int, dtype: torch.dtype, setting: Setting, seed: int
) -> tuple[Tensor, Tensor]:
    """A cache full of random keys and values: normal ones, over the whole range where they are integers."""
    caches = ops.allocate_kv(
        blocks, heads.key_value, heads.key_dim, heads.value_dim, block_size, dtype, setting.device,
        values_in_keys=heads.latent and setting.backend == "triton", backend=setting.backend,
    )  # fmt: skip
    width = 40.0 if dtype == torch.int8 else 1.0
    for index, cache in enumerate(caches):
        numbers = randn(*cache.shape, dtype=FP32, device=setting.device, seed=seed + index)
        cache.copy_(numbers.mul_(width).clamp_(-127, 127))
    return caches


def hide_unseen(
    caches: Sequence[Tensor], step: AttentionMetadata, query_lens: Sequence[int], block_size: int
) -> None:
    """Put NaN where nothing has been written yet: the new tokens' slots, and what follows a sequence's end."""
    k_cache, v_cache = caches
    for row, query_len, seq_len in zip(step.block_table.tolist(), query_lens, step.seq_lens.tolist(), strict=True):
        first = seq_len - query_len
        for index in range(first // block_size, -(-seq_len // block_size)):
            start = max(first - index * block_size, 0)
            k_cache[row[index], :, :, start:] = float("nan")
            v_cache[row[index], :, start:] = float("nan")
