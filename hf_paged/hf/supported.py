"""The families whose own tokens hf_paged promises, and why others are refused.

A model type is listed if `make models` finds every name of transformers' mapping that builds it equal to stock: see
docs/models.md, and tests/families/coverage.py for how to add one. Everything else is refused: many architectures hold
state (convolutions, state spaces) or hide masks that a packed batch would get silently wrong.
"""

from __future__ import annotations

SUPPORTED = frozenset(
    """
    axk1 bloom codegen deepseek_v2 deepseek_v3 falcon gemma gemma2 gemma3_text glm4_moe_lite gpt_neo gpt_neox_japanese
    gpt_oss gptj llama longcat_flash minicpm3 mistral mixtral mpt olmo2 openai-gpt phi3 qwen2 qwen3 qwen3_moe
    sarvam_mla xglm youtu
    """.split()
)

_STATE_SPACE = "a state-space model keeps a recurrent state instead of keys and values"
_STATE_SPACE_LAYERS = "its state-space layers keep a recurrent state that a packed batch would mix up"
_INDEXER = "its indexer chooses which tokens each query attends to, and keeps a cache of its own for that"

REASONS = {
    "axk2": _INDEXER,
    "bamba": _STATE_SPACE_LAYERS,
    "deepseek_v32": _INDEXER,
    "deepseek_v4": "its layers attend to compressed entries that they make and cache themselves",
    "dots3_note": _INDEXER,
    "dots3_note_text": _INDEXER,
    "falcon_h1": _STATE_SPACE_LAYERS,
    "falcon_mamba": _STATE_SPACE,
    "glm_moe_dsa": _INDEXER,
    "granitemoehybrid": _STATE_SPACE_LAYERS,
    "hy_v4": _INDEXER,
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
