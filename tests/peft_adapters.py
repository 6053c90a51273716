"""PEFT adapters for tests: their kinds, and values that show."""

from __future__ import annotations

import torch

WARNINGS = (
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # PEFT's own, on transformers 5.24
    "ignore:Detected that the base layer has no bias term",  # and what some of its adapters say of themselves
    "ignore:Failed to load the CUDA extension",
    "ignore:Sparse invariant checks are implicitly disabled",
    "ignore:Unsupported layer type",
    "ignore:Setting boft_n_butterfly_factor",
    "ignore:Model has .tie_word_embeddings=True. and a tied layer",
    "ignore:.lora_bias=True. was passed but the targeted layer:UserWarning",
    "ignore:Adapter .default.. .*LoRA tensor.s. have invalid shape:UserWarning",  # which biases do have
    "ignore:Setting .save_embedding_layers. to .True.:UserWarning",
)
LAYERS = dict(target_modules=["q_proj", "v_proj", "down_proj"])

# Every kind that treats each token by itself: configuration and options
TUNERS = {
    "lora": ("LoraConfig", dict(r=4, **LAYERS)),
    "lora-dora": ("LoraConfig", dict(r=4, use_dora=True, **LAYERS)),
    "ia3": ("IA3Config", dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "trainable_tokens": ("TrainableTokensConfig", dict(target_modules=["embed_tokens"], token_indices=[5, 9, 11])),
    "adalora": ("AdaLoraConfig", dict(total_step=10, init_r=4, **LAYERS)),
    "adaption_prompt": ("AdaptionPromptConfig", dict(adapter_layers=2, adapter_len=4)),
    "beft": ("BeftConfig", LAYERS),
    "boft": ("BOFTConfig", dict(boft_block_size=4, **LAYERS)),
    "c3a": ("C3AConfig", dict(block_size=4, **LAYERS)),
    "deft": ("DeftConfig", LAYERS),
    "delora": ("DeloraConfig", LAYERS),
    "fourierft": ("FourierFTConfig", dict(n_frequency=50, **LAYERS)),
    "frod": ("FrodConfig", LAYERS),
    "glora": ("GloraConfig", LAYERS),
    "gralora": ("GraloraConfig", dict(r=4, gralora_k=2, **LAYERS)),
    "hira": ("HiraConfig", LAYERS),
    "hra": ("HRAConfig", LAYERS),
    "ln_tuning": ("LNTuningConfig", dict(target_modules=["input_layernorm", "norm"])),
    "loha": ("LoHaConfig", LAYERS),
    "lokr": ("LoKrConfig", LAYERS),
    "miss": ("MissConfig", dict(r=4, **LAYERS)),
    "oft": ("OFTConfig", dict(oft_block_size=4, **LAYERS)),
    "osf": ("OSFConfig", LAYERS),
    "peanut": ("PeanutConfig", LAYERS),
    "psoft": ("PsoftConfig", dict(r=4, **LAYERS)),
    "pvera": ("PveraConfig", LAYERS),
    "randlora": ("RandLoraConfig", dict(r=4, **LAYERS)),
    "road": ("RoadConfig", dict(group_size=12, **LAYERS)),
    "shira": ("ShiraConfig", dict(r=4, **LAYERS)),
    "supertuning": ("SupertuningConfig", LAYERS),
    "tinylora": ("TinyLoraConfig", LAYERS),
    "unilora": ("UniLoraConfig", LAYERS),
    "vblora": ("VBLoRAConfig", dict(vector_length=4, num_vectors=16, **LAYERS)),
    "vera": ("VeraConfig", dict(r=4, **LAYERS)),
    "waveft": ("WaveFTConfig", dict(n_frequency=50, **LAYERS)),
}


def shake(model, seed: int = 1) -> None:
    """Give every trainable parameter a value of its own: fresh adapters add nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
