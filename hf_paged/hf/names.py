"""What transformers calls the cache that a model takes and returns: "cache" from 5.24 on, "past_key_values" before."""

from __future__ import annotations

import dataclasses

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAME = next(
    field.name for field in dataclasses.fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values")
)
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
