"""Models of real shape with random weights made on the device: nothing is downloaded.

The sizes are those of the published configurations. `TINY` is for a dry run of the benchmarks anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder of Llama's kind by its sizes, and the bytes that a decode step of it has to read at least."""

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    tied: bool
    rope: dict

    def config(self):
        """transformers' configuration, without an end-of-sequence token: every request runs to its full length."""
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self.model_type](
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_positions,
            tie_word_embeddings=self.tied,
            rope_parameters=dict(self.rope),
            rms_norm_eps=1e-5,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of one layer's weights with q/k/v and gate/up merged, and of the output embedding."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return {
            "qkv": (qkv, self.hidden_size),
            "o": (self.hidden_size, self.num_heads * self.head_dim),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
            "lm_head": (self.vocab_size, self.hidden_size),
        }

    def weight_bytes(self, itemsize: int = 2) -> int:
        """Bytes of all weights that one step reads. Of the input embedding it reads a few rows only."""
        *layer, head = (rows * columns for rows, columns in self.linears().values())
        return (sum(layer) * self.num_layers + head) * itemsize

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


LLAMA_8B = ModelShape(
    name="Llama-3.1-8B", model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, max_positions=131072, tied=False, rope=LLAMA3_ROPE,
)  # fmt: skip
QWEN3_06B = ModelShape(
    name="Qwen3-0.6B", model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072,
    num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, max_positions=40960, tied=True,
    rope=dict(rope_type="default", rope_theta=1e6),
)  # fmt: skip
SHAPES = {"llama-8b": LLAMA_8B, "qwen3-0.6b": QWEN3_06B}

_TINY_SIZES = dict(
    vocab_size=199, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    max_positions=512, rope=dict(rope_type="default", rope_theta=1e4),
)  # fmt: skip
TINY = {
    "llama-8b": ModelShape(name="tiny-llama", model_type="llama", tied=False, **_TINY_SIZES),
    "qwen3-0.6b": ModelShape(name="tiny-qwen3", model_type="qwen3", tied=True, **_TINY_SIZES),
}


def random_model(config, device: torch.device | str, dtype: torch.dtype, *, seed: int = 0) -> torch.nn.Module:
    """A causal language model in eval mode, made on `device`, whose greedy tokens vary and have clear winners.

    Matrices are normal with 1.2 / sqrt(columns), wide enough that one token does not follow for ever; all other
    parameters (norms, biases, sinks) get noise of 0.1 on what they start from.
    """
    from transformers import AutoModelForCausalLM

    device = torch.device(device)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)
            else:
                noise = torch.randn(parameter.shape, generator=generator, device=device)
                parameter.add_(noise.mul_(0.1).to(parameter.dtype))
    model.requires_grad_(False)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model
