"""Tiny sizes for every causal language model of transformers: pure data for `tiny_models.py`.

GENERIC is used for every configuration class, as far as the class has such a field. FAMILIES adds what a family needs
beyond it. A key is a name of transformers' MODEL_FOR_CAUSAL_LM_MAPPING, or such a name with a suffix for a variant of
it that changes masks or layers. A name that is not here is built from GENERIC alone. Nested dicts are the settings of
sub-configurations, which get GENERIC too.

Windows and chunks are shorter than the prompts of tests/families (70 tokens and 24 new ones), and cut blocks of 16.
"""

from __future__ import annotations

GENERIC = dict(
    vocab_size=199,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    is_decoder=True,
    tie_word_embeddings=False,
    # layers
    num_hidden_layers=3,
    num_layers=3,
    n_layer=3,
    n_layers=3,
    decoder_layers=3,
    encoder_layers=3,
    # widths
    hidden_size=48,
    n_embd=48,
    d_model=48,
    emb_dim=48,
    embedding_size=48,
    intermediate_size=64,
    ffn_hidden_size=64,
    ffn_dim=64,
    decoder_ffn_dim=64,
    encoder_ffn_dim=64,
    dff=64,
    # heads
    num_attention_heads=4,
    num_heads=4,
    n_head=4,
    n_heads=4,
    attention_heads=4,
    decoder_attention_heads=4,
    encoder_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    # positions
    max_position_embeddings=512,
    n_positions=512,
    max_target_positions=512,
    sliding_window=19,
    max_window_layers=1,
    # latent attention
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=12,
    v_head_dim=12,
    index_head_dim=12,
    index_n_heads=4,
    # experts
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_topk=2,
    moe_k=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    # embeddings a layer
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=199,
    laurel_rank=8,
    # nothing random
    router_jitter_noise=0.0,
    input_jitter_noise=0.0,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    layerdrop=0.0,
    decoder_layerdrop=0.0,
)
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
MAMBA = dict(mamba_n_heads=6, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=16)
DELTA = dict(
    num_hidden_layers=4,
    layer_types=["linear_attention", "full_attention"] * 2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
CONV = dict(num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)

FULL_ROTARY = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
LOOPED = dict(num_hidden_layers=6, n_input_layers=2, n_output_layers=2, initializer_range=0.5)
LOOP = dict(loop_layer_index_start=1, loop_layer_index_end=2, n_layers_per_attn_res_block=1)
INKLING = dict(num_hidden_layers=3, sliding_window_size=19, rel_extent=32, unpadded_vocab_size=199)
MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2]))
CLIP = dict(model_type="clip_vision_model", num_hidden_layers=2, image_size=8, patch_size=4)
SIGLIP = dict(image_size=8, patch_size=2)  # 16 patches, which are 4 tokens
LANGUAGE = dict(model_type="llama", vocab_size=199)
IMAGE = 190  # the placeholder's token id
QWEN_TOKENS = dict(image_token_id=IMAGE, vision_start_token_id=191, vision_end_token_id=192, video_token_id=193)
QWEN2_VISION = dict(depth=1, embed_dim=48, num_heads=2, patch_size=4)
QWEN_VISION = dict(depth=1, num_heads=2, patch_size=4, out_hidden_size=48)
FULL_LAST = ["sliding_attention", "sliding_attention", "full_attention"]
NGRAMS = dict(
    **DELTA, ngram_vocab_size_base=100, make_ngram_vocab_size_divisible_by=2, heads_per_ngram=2, split_ngram_parts=1,
    hc_lowrank=8, ple_embed_dim=8, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=12, indexer_budget=8,
    indexer_compress_ratio=2,
)  # fmt: skip

FAMILIES: dict[str, tuple[str, dict]] = {
    # through the attention interface
    "afmoe": ("afmoe", dict(global_attn_every_n_layers=2, num_dense_layers=1)),
    "beam": ("beam", dict(layer_types=MIXED)),
    "bert-bidirectional": ("bert", dict(is_decoder=False)),
    "cohere2": ("cohere2", dict(layer_types=MIXED)),
    "cohere2_moe": ("cohere2_moe", dict(layer_types=MIXED, num_shared_experts=1)),
    "cohere_compass_text": (
        "cohere_compass_text",
        dict(
            layer_types=MIXED,
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 2, 2]),
                full_attention=None,
            ),
        ),
    ),
    "cwm": ("cwm", dict(layer_types=MIXED)),
    "dbrx": (
        "dbrx",
        dict(
            attn_config=dict(kv_n_heads=2, clip_qkv=2.0, rope_theta=1e4),
            ffn_config=dict(ffn_hidden_size=64, moe_top_k=2),
        ),
    ),
    "doge-window": ("doge", dict(sliding_window=19)),
    "dory": (
        "dory",
        dict(**LOOPED, layer_types=MIXED + MIXED),
    ),
    "dory-last-loop": ("dory", dict(**LOOPED, layer_types=MIXED + MIXED, recurrent_kv_cache_mode="last_loop")),
    "dots1": ("dots1", dict(n_shared_experts=1, first_k_dense_replace=1, num_key_value_heads=4)),
    "dots1-full": ("dots1", dict(n_shared_experts=1, sliding_window=None)),
    "emu3": ("emu3", dict(text_config={})),
    "exaone4": ("exaone4", dict(layer_types=MIXED)),
    "exaone_moe": ("exaone_moe", dict(layer_types=MIXED)),
    "flint": ("flint", dict(layer_types=MIXED)),
    "fuyu": ("fuyu", dict(text_config=dict(model_type="persimmon"))),
    "gemma": ("gemma", dict(num_key_value_heads=1)),
    "gemma-tied": ("gemma", dict(tie_word_embeddings=True)),
    "gemma2": ("gemma2", dict(query_pre_attn_scalar=12, sliding_window=21)),
    "gemma3": (
        "gemma3",
        dict(
            text_config=dict(query_pre_attn_scalar=12, sliding_window=17, num_hidden_layers=7),
            vision_config=dict(model_type="siglip_vision_model", **SIGLIP),
            mm_tokens_per_image=4,
            image_token_id=IMAGE,
        ),
    ),
    "gemma3_text": ("gemma3_text", dict(query_pre_attn_scalar=12, sliding_window=17, num_hidden_layers=7)),
    "gemma3n_text": (
        "gemma3n_text",
        dict(num_hidden_layers=6, layer_types=MIXED + MIXED, num_kv_shared_layers=2),
    ),
    "gemma4": (
        "gemma4",
        dict(
            text_config=dict(layer_types=FULL_LAST), vision_config=dict(position_embedding_size=16), audio_config=None
        ),
    ),
    "gemma4_text": ("gemma4_text", dict(layer_types=FULL_LAST)),
    "gemma4_text-shared": (
        "gemma4_text",
        dict(num_hidden_layers=6, layer_types=FULL_LAST + FULL_LAST, num_kv_shared_layers=2),
    ),
    "gemma4_text-moe": (
        "gemma4_text",
        dict(layer_types=FULL_LAST, enable_moe_block=True, top_k_experts=2, attention_k_eq_v=True),
    ),
    "gemma4_unified": (
        "gemma4_unified",
        dict(
            text_config=dict(layer_types=FULL_LAST),
            vision_config=dict(mm_embed_dim=48, mm_posemb_size=16, output_proj_dims=48),
            audio_config=dict(audio_embed_dim=48),
        ),
    ),
    "gemma4_unified_text": ("gemma4_unified_text", dict(layer_types=FULL_LAST)),
    "git": ("git", dict(vision_config=dict(image_size=32))),
    "got_ocr2": (
        "got_ocr2",
        dict(
            text_config=dict(model_type="qwen2"),
            vision_config=dict(
                num_hidden_layers=1,
                image_size=64,
                output_channels=16,
                mlp_dim=32,
                global_attn_indexes=(0,),
                window_size=4,
            ),
        ),
    ),
    "gpt2-scaled": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True)),
    "gpt_bigcode-mha": ("gpt_bigcode", dict(multi_query=False)),
    "gpt_oss": ("gpt_oss", dict(sliding_window=20, num_hidden_layers=4)),
    "granite_swa": ("granite_swa", dict(layer_types=MIXED)),
    "granitemoe_swa": ("granitemoe_swa", dict(layer_types=MIXED, shared_intermediate_size=32)),
    "granitemoeshared": ("granitemoeshared", dict(shared_intermediate_size=32)),
    "hrm_text": ("hrm_text", dict(num_hidden_layers=2, H_cycles=2, L_cycles=2)),
    "kolibri1": ("kolibri1", dict(layer_types=MIXED)),
    "idefics3": (
        "idefics3",
        dict(text_config=dict(LANGUAGE), vision_config=dict(SIGLIP), scale_factor=2, image_token_id=IMAGE),
    ),
    "laguna": ("laguna", dict(layer_types=MIXED)),
    "laguna-heads": ("laguna", dict(layer_types=MIXED, num_attention_heads_per_layer=[4, 2, 6])),
    "llama": ("llama", {}),
    "llama-mha-bias": ("llama", dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True)),
    "llama-tied-llama3-rope": ("llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE)),
    "llava": (
        "llava",
        dict(text_config=dict(LANGUAGE), vision_config=dict(CLIP), image_token_index=IMAGE, image_seq_length=4),
    ),
    "llava-mistral": (
        "llava",
        dict(
            text_config=dict(LANGUAGE, model_type="mistral"),
            vision_config=dict(CLIP),
            image_token_index=IMAGE,
            vision_feature_select_strategy="full",
        ),
    ),
    "llava-pixtral": (
        "llava",
        dict(
            text_config=dict(LANGUAGE),
            vision_config=dict(model_type="pixtral", image_size=16, patch_size=4, num_hidden_layers=2),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
    ),
    "llava_next": (
        "llava_next",
        dict(
            text_config=dict(LANGUAGE),
            vision_config=dict(CLIP),
            image_token_index=IMAGE,
            image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
        ),
    ),
    "llama4": ("llama4", dict(text_config=dict(attention_chunk_size=22, no_rope_layer_interval=2))),
    "llama4_text": ("llama4_text", dict(attention_chunk_size=22, no_rope_layer_interval=2)),
    "llama4_text-temperature": (
        "llama4_text",
        dict(attention_chunk_size=22, no_rope_layer_interval=2, floor_scale=16),
    ),
    "llama4_text-full": (
        "llama4_text",
        dict(attention_chunk_size=None, interleave_moe_layer_step=2, intermediate_size_mlp=64),
    ),
    "mellum": ("mellum", dict(layer_types=MIXED)),
    "mimo_v2_flash": ("mimo_v2_flash", dict(layer_types=MIXED, head_dim=16)),
    "minimax_m3_vl_text-sparse": (
        "minimax_m3_vl_text",
        dict(layer_types=["full_attention", "minimax_m3_sparse"], num_hidden_layers=2, index_block_size=8,
             index_topk_blocks=2, index_head_dim=12),
    ),  # fmt: skip
    "ministral": ("ministral", dict(layer_types=MIXED)),
    "ministral3-temperature": (
        "ministral3",
        dict(
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=1e4,
                factor=4.0,
                original_max_position_embeddings=16,
                llama_4_scaling_beta=0.3,
            )
        ),
    ),
    "ministral3-full": ("ministral3", dict(sliding_window=None)),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral-window": ("mistral", {}),
    "mixtral": ("mixtral", dict(sliding_window=None)),
    "mixtral-window": ("mixtral", dict(sliding_window=25)),
    "mllama": ("mllama", dict(text_config=dict(cross_attention_layers=[1]))),
    "modernbert-decoder": ("modernbert-decoder", dict(local_attention=38)),
    "moss_transcribe_diarize": (
        "moss_transcribe_diarize",
        dict(text_config=dict(model_type="qwen3"), audio_config={}, audio_token_id=198),
    ),
    "olmo3": ("olmo3", dict(layer_types=MIXED)),
    "phi3": ("phi3", dict(sliding_window=None)),
    "phi3-window": ("phi3", dict(sliding_window=23)),
    "phi4_multimodal": (
        "phi4_multimodal",
        dict(
            sliding_window=None,
            vision_config=dict(num_hidden_layers=2, image_size=28, crop_size=28, num_attention_heads=16),
            audio_config=dict(
                num_blocks=1,
                num_attention_heads=16,
                ext_pw_out_channel=48,
                depthwise_separable_out_channel=48,
                nemo_conv_channels=8,
            ),
        ),
    ),
    "phimoe-full": ("phimoe", dict(sliding_window=None)),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True)),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        dict(text_config=MROPE, vision_config=dict(QWEN_VISION, fullatt_block_indexes=[0]), **QWEN_TOKENS),
    ),
    "qwen2_moe": ("qwen2_moe", dict(num_key_value_heads=4)),
    "qwen2_moe-window": ("qwen2_moe", dict(use_sliding_window=True, max_window_layers=3)),
    "qwen2_vl": ("qwen2_vl", dict(text_config=MROPE, vision_config=QWEN2_VISION, **QWEN_TOKENS)),
    "qwen2_vl-window": (
        "qwen2_vl",
        dict(text_config=dict(MROPE, use_sliding_window=True), vision_config=QWEN2_VISION, **QWEN_TOKENS),
    ),
    "qwen3-window": ("qwen3", dict(use_sliding_window=True)),
    "qwen3_moe": ("qwen3_moe", dict(norm_topk_prob=True)),
    "qwen3_moe-window": ("qwen3_moe", dict(use_sliding_window=True)),
    "qwen3_vl": (
        "qwen3_vl",
        dict(text_config=MROPE, vision_config=dict(QWEN_VISION, deepstack_visual_indexes=[0]), **QWEN_TOKENS),
    ),
    "roc_bert": (
        "roc_bert",
        dict(
            num_hidden_layers=2,
            pronunciation_embed_dim=8,
            pronunciation_vocab_size=9,
            shape_embed_dim=8,
            shape_vocab_size=9,
        ),
    ),
    "smolvlm": (
        "smolvlm",
        dict(text_config=dict(LANGUAGE), vision_config=dict(SIGLIP), scale_factor=2, image_token_id=IMAGE),
    ),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2)),
    "smollm3-window": ("smollm3", dict(no_rope_layer_interval=2, use_sliding_window=True)),
    "stablelm": ("stablelm", dict(rope_parameters=FULL_ROTARY)),
    "stablelm-parallel": (
        "stablelm",
        dict(rope_parameters=FULL_ROTARY, use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True),
    ),
    "starcoder2-full": ("starcoder2", dict(sliding_window=None)),
    "vaultgemma": ("vaultgemma", dict(query_pre_attn_scalar=12)),
    "xmod": ("xmod", dict(default_language="en_XX")),
    "inkling2_loop_text": ("inkling2_loop_text", dict(INKLING, **LOOP)),
    "inkling2_text": ("inkling2_text", INKLING),
    "inkling_text": ("inkling_text", dict(sliding_window_size=19, rel_extent=32, unpadded_vocab_size=199)),
    "reformer": ("reformer", dict(axial_pos_embds=False, attn_layers=("local", "lsh"), num_buckets=4, hash_seed=1)),
    "qwen4_exp": ("qwen4_exp", dict(text_config=NGRAMS)),
    "qwen4_exp_text": ("qwen4_exp_text", NGRAMS),
    "xlstm": ("xlstm", dict(hidden_size=64, num_blocks=3, qk_dim_factor=1.0)),
    # tokens chosen by indexers
    "axk2": ("axk2", dict(num_key_value_heads=4, index_topk=8)),
    "deepseek_v32": ("deepseek_v32", dict(num_key_value_heads=4, index_topk=8)),
    "deepseek_v4": (
        "deepseek_v4",
        dict(
            num_hidden_layers=4,
            num_key_value_heads=1,
            compress_rates=dict(compressed_sparse_attention=4, heavily_compressed_attention=8),
        ),
    ),
    "dots3_note": (
        "dots3_note",
        dict(
            text_config=dict(num_key_value_heads=4, index_topk=8),
            vision_config=dict(adapter_in_dim=48, adapter_out_dim=48, mlp_layer_types=["dense"] * 3),
            audio_config=dict(adapter_input_size=48, adapter_out_dim=48),
        ),
    ),
    "dots3_note_text": ("dots3_note_text", dict(num_key_value_heads=4, index_topk=8)),
    "glm_moe_dsa": ("glm_moe_dsa", dict(num_key_value_heads=4, index_topk=8)),
    "hy_v4": ("hy_v4", dict(num_key_value_heads=4, index_topk=8)),
    # latent attention
    **{
        name: (name, dict(num_key_value_heads=4, first_k_dense_replace=1))
        for name in (
            "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3",
            "sarvam_mla", "youtu",
        )
    },
    "deepseek_v3-no-q-lora": (
        "deepseek_v3",
        dict(num_key_value_heads=4, q_lora_rank=None, rope_interleave=False, attention_bias=True),
    ),
    "longcat_flash": ("longcat_flash", dict(num_layers=2, num_key_value_heads=4, head_dim=8, zero_expert_num=2)),
    # decoders of encoder-decoders: stock counts their layers by the encoder's
    **{
        name: (name, dict(encoder_layers=3, encoder_attention_heads=4, is_encoder_decoder=False))
        for name in ("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "whisper")
    },
    # attention by modules with a softmax of their own
    "big_bird": ("big_bird", dict(attention_type="original_full")),
    "megatron-bert": ("megatron-bert", dict(num_hidden_layers=2, num_attention_heads=2)),
    "roformer-rotary-value": ("roformer", dict(rotary_value=True)),
    "bloom-6-heads": (
        "bloom",
        dict(n_head=6, apply_residual_connection_post_layernorm=True, tie_word_embeddings=False),
    ),
    "codegen": ("codegen", dict(rotary_dim=8)),
    "falcon-7b": ("falcon", dict(multi_query=True, parallel_attn=True, num_attention_heads=4)),
    "falcon-40b": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2, bias=True)),
    "falcon-rw": (
        "falcon",
        dict(
            alibi=True, multi_query=False, parallel_attn=False, bias=True, num_attention_heads=6,
            tie_word_embeddings=False,
        ),
    ),
    "falcon-alibi-mqa": ("falcon", dict(alibi=True, multi_query=True, num_attention_heads=6)),
    "gpt_neo": ("gpt_neo", dict(num_layers=4, attention_types=[[["global", "local"], 2]], window_size=20)),
    "gptj": ("gptj", dict(rotary_dim=8)),
    "mpt-6-heads": ("mpt", dict(n_heads=6, attn_config=dict(clip_qkv=1.5, softmax_scale=0.2))),
    # layers that keep a state
    "mamba": ("mamba", dict(state_size=8, time_step_rank=4)),
    "mamba2": ("mamba2", dict(num_heads=6, head_dim=16, n_groups=2, state_size=8, chunk_size=16)),
    "falcon_mamba": ("falcon_mamba", dict(state_size=8, time_step_rank=4)),
    "jamba": (
        "jamba",
        dict(
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=0,
            mamba_d_state=8,
            mamba_dt_rank=4,
        ),
    ),
    "bamba": ("bamba", dict(num_hidden_layers=4, attn_layer_indices=[1, 3], **MAMBA)),
    "granitemoehybrid": (
        "granitemoehybrid",
        dict(num_hidden_layers=4, layer_types=["mamba", "attention"] * 2, shared_intermediate_size=32, **MAMBA),
    ),
    "falcon_h1": ("falcon_h1", dict(mamba_d_ssm=96, **MAMBA)),
    "nemotron_h": (
        "nemotron_h",
        dict(
            num_hidden_layers=4,
            layers_block_type=["mamba", "attention", "moe", "mamba"],
            mamba_num_heads=6,
            mamba_head_dim=16,
            n_groups=2,
            ssm_state_size=8,
            chunk_size=16,
            time_step_min=0.4,  # many time steps are shorter, so where stock limits them shows
            time_step_max=0.8,
        ),
    ),
    "qwen3_next": ("qwen3_next", DELTA),
    "qwen3_5": ("qwen3_5", dict(text_config=DELTA)),
    "qwen3_5_moe": ("qwen3_5_moe", dict(text_config=DELTA)),
    "qwen3_5_text": ("qwen3_5_text", DELTA),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", DELTA),
    "olmo_hybrid": ("olmo_hybrid", {**DELTA, "linear_num_key_heads": 4}),
    "kimi_linear": (
        "kimi_linear",
        dict(
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention"] * 2,
            linear_num_heads=4,
            linear_head_dim=16,
            num_key_value_heads=4,
        ),
    ),
    "lfm2": ("lfm2", dict(block_auto_adjust_ff_dim=False, **CONV)),
    "lfm2_moe": ("lfm2_moe", dict(num_dense_layers=1, **CONV)),
    "lfm3": (
        "lfm3",
        dict(
            num_hidden_layers=5,
            layer_types=["conv", "conv", "full_attention", "conv", "sliding_attention"],
            sliding_window=20,
        ),
    ),
    "lara_mini": (
        "lara_mini",
        {
            **DELTA,
            "layer_types": ["linear_attention", "sliding_attention", "linear_attention", "full_attention"],
            "sliding_window": 20,
        },
    ),
    "bailing_hybrid": (
        "bailing_hybrid",
        dict(num_hidden_layers=4, layer_group_size=2, head_dim=12, num_key_value_heads=4, first_k_dense_replace=1),
    ),
    "zaya": ("zaya", dict(num_experts_per_tok=1, router_hidden_size=32)),
    "zamba": (
        "zamba",
        dict(num_hidden_layers=6, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4),
    ),
    "zamba2": (
        "zamba2",
        dict(
            layers_block_type=["linear_attention", "hybrid", "hybrid"],
            num_key_value_heads=4,
            mamba_d_state=8,
            mamba_ngroups=2,
            n_mamba_heads=6,
            chunk_size=16,
            use_shared_attention_adapter=True,
            adapter_rank=8,
            use_mem_rope=True,
            time_step_min=0.1,
            time_step_max=0.3,
        ),
    ),
    "minimax": (
        "minimax",
        dict(
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention"] * 2,
            block_size=16,
            sliding_window=None,
        ),
    ),
    "minimax-window": ("minimax", dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])),
}

# Names of which there is no tiny model that generates from text, and why.
UNBUILT: dict[str, str] = {
    "blt": "it reads bytes, and cuts them into patches with a model of its own",
    "gemma3n": "its image encoder needs the package timm",
    "gemma4_assistant": "it guesses tokens from the states of another model, and generates nothing by itself",
    "gemma4_unified_assistant": "it guesses tokens from the states of another model, and generates nothing by itself",
    "musicgen": "it generates several codebooks of audio at a time",
    "musicgen_melody": "it generates several codebooks of audio at a time",
}
