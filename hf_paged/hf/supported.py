"""The families whose own tokens hf_paged promises, and why others are refused.

A model type is listed if `make models` finds every name of transformers' mapping that builds it equal to stock: see
docs/models.md, and tests/families/coverage.py for how to add one. Everything else is refused: many architectures hold
state (convolutions, state spaces) or hide masks that a packed batch would get silently wrong.
"""

from __future__ import annotations

SUPPORTED = frozenset(
    """
    gemma gemma2 gemma3_text gpt_oss llama mistral mixtral olmo2 phi3 qwen2 qwen3 qwen3_moe
    """.split()
)

_STATE_SPACE = "a state-space model keeps a recurrent state instead of keys and values"
_STATE_SPACE_LAYERS = "its state-space layers keep a recurrent state that a packed batch would mix up"

REASONS = {
    "bamba": _STATE_SPACE_LAYERS,
    "falcon_h1": _STATE_SPACE_LAYERS,
    "falcon_mamba": _STATE_SPACE,
    "granitemoehybrid": _STATE_SPACE_LAYERS,
    "jamba": _STATE_SPACE_LAYERS,
    "lfm2": "its convolution layers keep a state that a packed batch would mix up",
    "mamba": _STATE_SPACE,
    "mamba2": _STATE_SPACE,
    "nemotron_h": _STATE_SPACE_LAYERS,
    "qwen3_next": "its linear-attention layers keep a state that a packed batch would mix up",
    "recurrent_gemma": "its recurrent layers keep a state that a packed batch would mix up",
    "rwkv": "a recurrent model keeps a state instead of keys and values",
    "zamba": _STATE_SPACE_LAYERS,
    "zamba2": _STATE_SPACE_LAYERS,
}
