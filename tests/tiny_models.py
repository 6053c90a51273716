"""Tiny random models of every supported family, small enough for a test and shaped to reach each special case."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

# What this transformers calls the cache that is handed to `forward` and `generate`, and that they return.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"

COMMON = dict(
    vocab_size=199,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-mha-bias": ("llama", dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True)),
    "llama-tied-llama3-rope": (
        "llama",
        dict(
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=10000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
    ),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral-window": ("mistral", dict(sliding_window=19)),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=18, max_window_layers=1)),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", dict(num_key_value_heads=1, tie_word_embeddings=False)),
    "gemma2": ("gemma2", dict(tie_word_embeddings=False, sliding_window=21, query_pre_attn_scalar=12)),
    "gemma3": (
        "gemma3_text",
        dict(tie_word_embeddings=False, sliding_window=17, query_pre_attn_scalar=12, num_hidden_layers=7),
    ),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", dict(sliding_window=23)),
    "olmo2": ("olmo2", {}),
    "gpt_oss": ("gpt_oss", {**MOE, "sliding_window": 20, "num_hidden_layers": 4}),
    "qwen3_moe": ("qwen3_moe", {**MOE, "norm_topk_prob": True}),
    "mixtral": ("mixtral", dict(MOE)),
    "mixtral-window": ("mixtral", {**MOE, "sliding_window": 25}),
}


def tiny_config(name: str, **overrides):
    model_type, special = FAMILIES[name]
    settings = {**COMMON, **special, **overrides}
    return AutoConfig.for_model(model_type, **settings)


def tiny_model(name: str, *, seed: int = 0, dtype=torch.float32, **overrides):
    """A random model in eval mode whose greedy tokens vary: weights are wide enough for clear winners."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides), dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.copy_(torch.randn(parameter.shape) * 0.6 / parameter.shape[-1] ** 0.5 * 2)
                else:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
    finally:
        torch.set_rng_state(generator_state)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model
