"""Tiny random models, small enough for a test and shaped to reach each special case; sizes are in tiny_configs.py."""

from __future__ import annotations

import dataclasses
import inspect

import torch
from tiny_configs import FAMILIES, GENERIC
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    PreTrainedConfig,
)

# What this transformers calls the cache that is handed to `forward` and `generate`, and that they return.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def tiny_config(label: str, **overrides):
    """The configuration of a key of FAMILIES, or of a name in transformers' mapping."""
    name, special = FAMILIES.get(label, (label, {}))
    config_class = CONFIG_MAPPING[name]
    return config_class(**_settings(config_class, {**special, **overrides}))


def _settings(config_class: type, special: dict) -> dict:
    known = {field.name for field in dataclasses.fields(config_class)}
    settings = {key: value for key, value in GENERIC.items() if key in known}
    for key, value in special.items():
        sub_class = getattr(config_class, "sub_configs", {}).get(key)
        if sub_class is not None and isinstance(value, dict):
            value = dict(value)
            if not issubclass(sub_class, PreTrainedConfig):  # AutoConfig
                sub_class = CONFIG_MAPPING[value.pop("model_type")]
            value = sub_class(**_settings(sub_class, value))
        settings[key] = value
    return settings


def _auto_class(config) -> type:
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def tiny_model(label: str, *, seed: int = 0, dtype=torch.float32, **overrides):
    """A random model in eval mode whose greedy tokens vary: weights are wide enough for clear winners."""
    config = tiny_config(label, **overrides)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = _auto_class(config).from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.copy_(torch.randn(parameter.shape) * 0.6 / parameter.shape[-1] ** 0.5 * 2)
                else:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
    finally:
        torch.set_rng_state(generator_state)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model
