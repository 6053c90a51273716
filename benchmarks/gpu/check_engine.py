"""The engine against stock transformers on the device: tokens in float32, logits in bf16. Models are made here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch

import hf_paged
from hf_paged import EngineConfig, SamplingParams
from hf_paged_kernels import ops

from .checking import Case, Setting, guarded
from .models import random_model

BASE = dict(
    vocab_size=499, hidden_size=256, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None,
    pad_token_id=None, tie_word_embeddings=False,
)  # fmt: skip
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = dict(num_experts=8, num_local_experts=8, num_experts_per_tok=2, moe_intermediate_size=128)
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen3": {},
    "mistral": dict(sliding_window=40),
    "gemma2": dict(query_pre_attn_scalar=64, sliding_window=40, layer_types=MIXED),
    "gemma3_text": dict(query_pre_attn_scalar=64, sliding_window=40, layer_types=MIXED),
    "gpt_oss": dict(
        EXPERTS, sliding_window=40, layer_types=MIXED, rope_parameters=dict(rope_type="default", rope_theta=1e4)
    ),
    "qwen3_moe": EXPERTS,
    "deepseek_v3": dict(
        q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=8,
        n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=128, first_k_dense_replace=1,
        num_key_value_heads=4,
    ),
    "bloom": dict(n_layer=3, n_head=4),
    "gpt2": dict(n_embd=256, n_layer=3, n_head=4, n_positions=1024),
    "lfm2": dict(layer_types=["conv", "full_attention", "conv"]),
}  # fmt: skip
IN_SMALL = ("llama", "qwen3", "gemma3_text", "gpt_oss")
KV_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
PROMPTS, NEW = (5, 230, 64, 1, 117), 48
SMALL_PROMPTS, SMALL_NEW = (5, 37, 1), 6


def tokens_of_families(setting: Setting) -> Iterator[Case]:
    """Every family's greedy tokens are stock's: all prompts at once, in chunks that cut prompts."""
    for family in IN_SMALL if setting.small else FAMILIES:
        yield family_case(family, setting)


@guarded
def family_case(family: str, setting: Setting) -> Case:
    model = tiny(family, setting)
    expected = stock_tokens(model, setting)
    with engine_on(model, setting, max_batch_tokens=32 if setting.small else 96) as engine:
        first = differing(f"{family}, chunks", engine_tokens(engine, setting), expected)
        again = differing(f"{family}, cached prefixes", engine_tokens(engine, setting), expected)
    return max(first, again, key=lambda case: case.used)


def tokens_of_modes(setting: Setting) -> Iterator[Case]:
    """Neither CUDA graphs nor overlapping steps change a token, nor do sleeping and another cache."""
    graphs = (False, True) if setting.device.type == "cuda" else (False,)
    for family in ("llama",) if setting.small else ("llama", "gemma3_text", "gpt_oss", "deepseek_v3"):
        model = tiny(family, setting)
        expected = stock_tokens(model, setting)
        for cuda_graphs, overlap in product(graphs, (False, True)):
            name = f"{family}, cuda_graphs={cuda_graphs}, overlap={overlap}"
            with engine_on(model, setting, cuda_graphs=cuda_graphs, overlap=overlap) as engine:
                yield differing(name, engine_tokens(engine, setting), expected)
                if cuda_graphs and not engine.stats()["cuda_graphs"]:
                    reasons = "; ".join(f"{what}: {why}" for what, why in hf_paged.explain(model).fallbacks.items())
                    yield Case(f"{name}: no step was recorded ({reasons})", 1.0, 0.0)
                engine.sleep()
                engine.wake_up()
                yield differing(f"{name}, woken", engine_tokens(engine, setting), expected)
                engine.resize_kv_cache("64MiB")
                yield differing(f"{name}, resized", engine_tokens(engine, setting), expected)


def tokens_of_shared_prefixes(setting: Setting) -> Iterator[Case]:
    """Requests that begin alike, so that their decodes may read the keys of what they share once for all."""
    start, tails, count = ((70, (2, 5, 1), 4) if setting.small else (600, (1, 40, 7, 90, 3, 12, 5, 64), 32))
    shared, generator = random_ids(start, 50), torch.Generator().manual_seed(51)
    rows = [shared + torch.randint(3, BASE["vocab_size"], (tail,), generator=generator).tolist() for tail in tails]
    for family in ("llama",) if setting.small else ("llama", "gemma3_text", "gpt_oss", "deepseek_v3"):
        model = tiny(family, setting)
        expected = stock_tokens(model, setting, rows, count)
        with engine_on(model, setting) as engine:
            first = tokens_of(engine.generate(rows, SamplingParams(temperature=0.0, max_tokens=count)))
            yield differing(f"{family}, computed together", first, expected)
            again = tokens_of(engine.generate(rows, SamplingParams(temperature=0.0, max_tokens=count)))
            yield differing(f"{family}, from the prefix cache", again, expected)


def sampling_repeats(setting: Setting) -> Iterator[Case]:
    """A seeded request draws the same tokens alone and among others; other seeds draw others."""
    model = tiny("llama", setting)
    ids, count = prompts(setting), SMALL_NEW if setting.small else NEW
    options = (dict(), dict(top_k=20), dict(top_p=0.8), dict(min_p=0.05), dict(repetition_penalty=1.3, top_p=0.9))
    params = [
        SamplingParams(temperature=0.9, seed=i, max_tokens=count, **options[i % len(options)]) for i in range(len(ids))
    ]
    with engine_on(model, setting, overlap=False) as engine:
        together = tokens_of(engine.generate(ids, params))
        alone = [tokens_of(engine.generate([row], [own]))[0] for row, own in zip(ids, params)]
        yield differing("alone and together", alone, together)
        same_prompt = [SamplingParams(temperature=1.5, seed=seed, max_tokens=count) for seed in (1, 2, 1)]
        first, second, again = tokens_of(engine.generate([ids[0]] * 3, same_prompt))
        yield differing("equal seeds", [again], [first])
        yield Case("other seeds draw the same", float(first == second), 0.0)
    with engine_on(model, setting, overlap=True) as engine:
        yield differing("overlapping steps", tokens_of(engine.generate(ids, params)), together)


def logits_in_bf16(setting: Setting) -> Iterator[Case]:
    """The engine's bf16 logits are as close to the float32 model's as stock's own bf16 logits.

    The error is the root mean square of ours by that of stock's. Prompts and then forced single tokens, so that logits
    come from prefill and from decode steps.
    """
    sizes = {} if setting.small else dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=12,
                                          num_attention_heads=16, num_key_value_heads=4, head_dim=128)  # fmt: skip
    for family in ("llama",) if setting.small else ("llama", "qwen3", "gemma3_text"):
        own = sizes | (dict(layer_types=MIXED * 4) if sizes and "layer_types" in FAMILIES[family] else {})
        model = tiny(family, setting, dtype=torch.bfloat16, **own)
        sequences, lengths = forced_sequences(setting)
        stock = forward_logits(model, sequences, lengths)
        with engine_on(model, setting) as engine:
            ours = forced_logits(engine, sequences, lengths)
        exact = forward_logits(model.float(), sequences, lengths)
        errors = [(logits - exact).pow(2).mean().sqrt() for logits in (ours, stock)]
        yield Case(f"{family}, error by stock's", float(errors[0] / errors[1]), 1.25)


def quantized_caches(setting: Setting) -> Iterator[Case]:
    """With keys and values of 8 bits the engine's logits are those of the reference kernels with such a cache.

    Where a value lies between two codes, float32 in another order may choose the other one: so the error is the root
    mean square over all logits, by their own.
    """
    for family in ("llama",) if setting.small else ("llama", "gemma3_text", "gpt_oss"):
        model = tiny(family, setting)
        sequences, lengths = forced_sequences(setting)
        exact = forward_logits(model, sequences, lengths)
        for kv_dtype in ("fp8", "int8"):
            if reason := ops.why_unsupported(setting.backend, setting.device, kv_dtype=KV_DTYPES[kv_dtype]):
                print(f"     not checked: kv_dtype {kv_dtype}: {reason}")
                continue
            with engine_on(model, setting, kv_dtype=kv_dtype) as engine:
                ours = forced_logits(engine, sequences, lengths)
            with engine_on(model, dataclasses.replace(setting, backend="reference"), kv_dtype=kv_dtype) as engine:
                reference = forced_logits(engine, sequences, lengths)
            for name, other, bound in (("the reference", reference, 2e-3), ("no rounding", exact, 0.2)):
                error = (ours - other).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
                yield Case(f"{family}, {kv_dtype}, to {name}", float(error), bound)


AREAS = {
    "engine-families": tokens_of_families,
    "engine-modes": tokens_of_modes,
    "engine-prefixes": tokens_of_shared_prefixes,
    "engine-sampling": sampling_repeats,
    "engine-logits": logits_in_bf16,
    "engine-quantized": quantized_caches,
}


def tiny(family: str, setting: Setting, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[family]
    known = {field.name for field in dataclasses.fields(config_class)}
    sizes = BASE | (SMALL if setting.small else {}) | FAMILIES[family] | changes
    if setting.small and "layer_types" in sizes:
        sizes |= dict(layer_types=sizes["layer_types"][:2], sliding_window=11)
    config = config_class(**{key: value for key, value in sizes.items() if key in known})
    return random_model(config, setting.device, dtype)


def prompts(setting: Setting) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = SMALL_PROMPTS if setting.small else PROMPTS
    return [torch.randint(3, BASE["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, BASE["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def forced_sequences(setting: Setting) -> tuple[list[list[int]], list[int]]:
    """The prompts with random tokens after them, and how long the prompts are."""
    generator, count = torch.Generator().manual_seed(100), 4 if setting.small else 24
    starts = prompts(setting)
    tails = torch.randint(3, BASE["vocab_size"], (len(starts), count), generator=generator).tolist()
    return [start + tail for start, tail in zip(starts, tails, strict=True)], [len(start) for start in starts]


@contextmanager
def engine_on(model: torch.nn.Module, setting: Setting, **options) -> Iterator[hf_paged.Engine]:
    """An engine that must use the backend under test everywhere, with a small cache."""
    config = EngineConfig(attention_backend=setting.backend, kv_cache_memory="256MiB", **options)
    with hf_paged.Engine(model, config=config) as engine:
        yield engine


def stock_tokens(
    model: torch.nn.Module, setting: Setting, rows: list[list[int]] | None = None, count: int | None = None
) -> list[list[int]]:
    """Stock's greedy tokens, one prompt at a time, before the model is patched. By default of `prompts`."""
    count = count or (SMALL_NEW if setting.small else NEW)
    inputs = [torch.tensor([ids], device=setting.device) for ids in rows or prompts(setting)]
    options = dict(max_new_tokens=count, do_sample=False)
    made = [model.generate(row, attention_mask=torch.ones_like(row), **options)[0] for row in inputs]
    return [tokens[row.shape[1] :].tolist() for row, tokens in zip(inputs, made, strict=True)]


def engine_tokens(engine: hf_paged.Engine, setting: Setting) -> list[list[int]]:
    count = SMALL_NEW if setting.small else NEW
    return tokens_of(engine.generate(prompts(setting), SamplingParams(temperature=0.0, max_tokens=count)))


def tokens_of(outputs: list[hf_paged.RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def differing(name: str, got: list[list[int]], expected: list[list[int]]) -> Case:
    """The error is the number of requests whose tokens differ; the name tells where the first one does."""
    wrong = [i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]]
    if wrong:
        pairs = list(zip(got[wrong[0]], expected[wrong[0]]))
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        name = f"{name}: request {wrong[0]} differs from new token {place} on"
    return Case(name, float(len(wrong)), 0.0)


def forward_logits(model: torch.nn.Module, sequences: list[list[int]], lengths: list[int]) -> torch.Tensor:
    """Logits [R, V] at the last prompt token and every forced token but the last, of one forward a sequence."""
    rows = []
    with torch.no_grad():
        for sequence, length in zip(sequences, lengths, strict=True):
            ids = torch.tensor([sequence], device=model.device)
            rows.append(model(ids, use_cache=False).logits[0, length - 1 : -1].float())
    return torch.cat(rows)


def forced_logits(engine: hf_paged.Engine, sequences: list[list[int]], lengths: list[int]) -> torch.Tensor:
    """The same logits from the engine: a processor per request notes them and allows the next forced token only."""
    seen: list[list[torch.Tensor]] = [[] for _ in sequences]

    def processor(sequence: list[int], notes: list[torch.Tensor]):
        def force(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            notes.append(logits.float().clone())
            only = torch.full_like(logits, float("-inf"))
            only[sequence[len(token_ids)]] = 0.0
            return only

        return force

    for sequence, length, notes in zip(sequences, lengths, seen, strict=True):
        params = SamplingParams(temperature=0.0, max_tokens=len(sequence) - length)
        engine.add(sequence[:length], params, logits_processors=[processor(sequence, notes)])
    while engine.has_unfinished():
        for output in engine.step():
            if output.error is not None:
                raise output.error
    return torch.cat([torch.stack(notes) for notes in seen])
