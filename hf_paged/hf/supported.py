"""The families whose own tokens hf_paged promises, and why others are refused.

A model type is listed if `make models` finds every name of transformers' mapping that builds it equal to stock: see
docs/models.md, and tests/families/coverage.py for how to add one. Everything else is refused: many architectures hold
state (convolutions, state spaces) or hide masks that a packed batch would get silently wrong.
"""

from __future__ import annotations

SUPPORTED = frozenset(
    """
    axk1 bailing_hybrid bamba bart big_bird blenderbot blenderbot-small bloom codegen deepseek_v2 deepseek_v3 falcon
    falcon_h1 falcon_mamba gemma gemma2 gemma3_text glm4_moe_lite gpt_neo gpt_neox_japanese gpt_oss gptj
    granitemoehybrid jamba kimi_linear lara_mini lfm2 lfm2_moe lfm3 llama longcat_flash mamba mamba2 marian mbart
    megatron-bert minicpm3 minimax mistral mixtral mpt mvp nemotron_h olmo2 olmo_hybrid openai-gpt pegasus phi3 plbart
    qwen2 qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next rembert roformer sarvam_mla trocr whisper xglm youtu
    zamba zamba2 zaya
    """.split()
)

_INDEXER = "its indexer chooses which tokens each query attends to, and keeps a cache of its own for that"
_STATE_ELSEWHERE = "its layers keep a state outside the cache, which a packed batch would mix up"

REASONS = {
    "axk2": _INDEXER,
    "bigbird_pegasus": "its decoder attends in both directions where transformers leaves the mask out",
    "cpmant": "its attention has a bias by segments, over the whole padded batch",
    "deepseek_v32": _INDEXER,
    "deepseek_v4": "its layers attend to compressed entries that they make and cache themselves",
    "dots3_note": _INDEXER,
    "dots3_note_text": _INDEXER,
    "glm_moe_dsa": _INDEXER,
    "hy_v4": _INDEXER,
    "prophetnet": "it computes streams for several tokens ahead beside the text's own",
    "recurrent_gemma": _STATE_ELSEWHERE,
    "reformer": "its attention hashes the tokens of a batch into buckets",
    "rwkv": _STATE_ELSEWHERE,
    "xlm": "it predicts a mask token put after the text, with attention over all of it at every step",
    "xlnet": "it predicts a token put after the text, with a mask of permutations at every step",
}
