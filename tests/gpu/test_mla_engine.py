"""A model with latent attention on the Triton backend: one copy of the latents, and stock's own tokens."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from hf_paged import Engine, EngineConfig, SamplingParams
from hf_paged.base.errors import UnsupportedOption

PROMPTS = [[5, 9, 2, 77, 31], [3, 8] * 10, [8, 1, 60, 4, 4, 4, 19]]
TOKENS = 5


@pytest.fixture(scope="module", params=["deepseek_v2", "deepseek_v3"])
def model(request, device):
    return tiny_model(request.param, num_hidden_layers=2).to(device)


def config(backend: str) -> EngineConfig:
    return EngineConfig(attention_backend=backend, block_size=16, max_batch_tokens=16)


def test_tokens_are_those_of_stock(model):
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        expected.append(output[0, len(prompt) :].tolist())
    with Engine(model, config=config("triton")) as engine:
        outputs = engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=TOKENS))
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
        rerun = engine.generate(PROMPTS[1:2], SamplingParams(temperature=0, max_tokens=TOKENS))
        assert list(rerun[0].outputs[0].token_ids) == expected[1]
        assert engine.stats()["prefix_hit_tokens"] >= 16  # latents of a cached prefix, too


def test_latents_are_kept_once(device):
    """Per token rank + rope numbers; elsewhere the rank twice, for keys and values in orders of their own."""
    model = tiny_model("deepseek_v3", num_hidden_layers=2).to(device)
    rank, rope = model.config.kv_lora_rank, model.config.qk_rope_head_dim
    for backend, width in (("triton", rank + rope), ("reference", 2 * rank + rope)):
        with Engine(model, config=config(backend)) as engine:
            engine.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=1))
            assert engine.stats()["kv_bytes_peak"] == 16 * width * 4 * 2  # one block of 16 tokens, float32, two layers


def test_quantized_latents_are_refused(device):
    model = tiny_model("deepseek_v3", num_hidden_layers=2).to(device)
    with pytest.raises(UnsupportedOption, match="kv_dtype='int8'"):
        Engine(model, config=config("triton").replace(kv_dtype="int8"))
