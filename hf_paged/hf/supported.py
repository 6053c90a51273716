"""The families whose own tokens hf_paged promises, and why others are refused.

A model type is listed if `make models` finds every name of transformers' mappings that builds it equal to stock, for
text: see docs/models.md, and tests/families/coverage.py for how to add one. Everything else is refused: many
architectures hold state (convolutions, state spaces) or hide masks that a packed batch would get silently wrong.
"""

from __future__ import annotations

SUPPORTED = frozenset(
    """
    afmoe apertus apertus1p5_text arcee aria_text axk1 bailing_hybrid bamba bart beam bert bert-generation big_bird
    biogpt bitnet blenderbot blenderbot-small bloom camembert codegen cohere cohere2 cohere2_moe cohere_compass_text
    ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3 diffllama dory dots1 electra emu3_text_model ernie ernie4_5
    ernie4_5_moe exaone exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint fuyu gemma gemma2 gemma3
    gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite got_ocr2 gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax idefics3
    internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama llama4_text
    llava llava_next longcat_flash mamba mamba2 marian mbart megatron-bert mellum mimo_v2_flash minicpm3 minimax
    minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mllama_text_model modernbert-decoder
    moss_transcribe_diarize mpt mvp nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt
    pegasus persimmon phi phi3 phi4_multimodal phimoe plbart qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5_moe_text
    qwen3_5_text qwen3_moe qwen3_next qwen3_vl rembert roberta roberta-prelayernorm roc_bert roformer sarvam_mla
    sarvam_moe seed_oss smollm3 smolvlm solar_open stablelm starcoder2 trocr vaultgemma whisper xglm xlm-roberta
    xlm-roberta-xl xmod youtu zamba zamba2 zaya
    """.split()
)

# Families of SUPPORTED whose language model is of any type, as their checkpoints say: it has to be one of SUPPORTED, too.
AROUND_A_LANGUAGE_MODEL = frozenset("idefics3 llava llava_next smolvlm".split())

# Settings of listed families that change what their layers keep: model type -> name -> (value, why it is refused).
REFUSED_SETTINGS = {
    "dory": {"recurrent_kv_cache_mode": ("last_loop", "its earlier loops attend to what the last one has cached")},
}

_INDEXER = "its indexer chooses which tokens each query attends to, and keeps a cache of its own for that"
_RELATIVE = "its attention has a learnt bias by relative position"
_STATE_ELSEWHERE = "its layers keep a state outside the cache, which a packed batch would mix up"

REASONS = {
    "axk2": _INDEXER,
    "bigbird_pegasus": "its decoder attends in both directions where transformers leaves the mask out",
    "blt": "its layers attend to patches of bytes that a model of its own cuts",
    "cpmant": "its attention has a bias by segments, over the whole padded batch",
    "deepseek_v32": _INDEXER,
    "deepseek_v4": "its layers attend to compressed entries that they make and cache themselves",
    "doge": "its attention has a bias by the value of each key, and drops keys by it beyond config.keep_window_size",
    "dots3_note": _INDEXER,
    "dots3_note_text": _INDEXER,
    "gemma4_unified": "its tokens attend in both directions within an image, which its masks always provide for",
    "git": "its attention holds the image's tokens in front of the text's",
    "glm_moe_dsa": _INDEXER,
    "hy_v4": _INDEXER,
    "inkling2_loop_text": _RELATIVE,
    "inkling2_text": _RELATIVE,
    "inkling_text": _RELATIVE,
    "mllama": "its layers look at images by cross-attention",
    "moshi": "its cache keeps fewer tokens than its layers see",
    "prophetnet": "it computes streams for several tokens ahead beside the text's own",
    "qwen4_exp_text": "its layers mix n-grams of tokens and choose keys by an indexer",
    "recurrent_gemma": _STATE_ELSEWHERE,
    "reformer": "its attention hashes the tokens of a batch into buckets",
    "rwkv": _STATE_ELSEWHERE,
    "xlm": "it predicts a mask token put after the text, with attention over all of it at every step",
    "xlnet": "it predicts a token put after the text, with a mask of permutations at every step",
    "xlstm": _STATE_ELSEWHERE,
}
