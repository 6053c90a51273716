"""Requests with one system prompt on the Triton backend: its keys are read for all at once, to the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

from hf_paged import Engine, EngineConfig, SamplingParams
from hf_paged.runtime import shared_prefix

SYSTEM = [(7 * i) % 60 + 1 for i in range(35)]  # two blocks and a bit
PROMPTS = [[*SYSTEM, *end] for end in ([5], [9, 14, 3], [60, 2])] + [[4, 8, 15]]
TOKENS = 3


def generate(engine):
    """Tokens of all prompts, the first computed beforehand so that its blocks are found by the others."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS)
    first = engine.generate(PROMPTS[:1], params)
    return [list(output.outputs[0].token_ids) for output in first + engine.generate(PROMPTS[1:], params)]


@pytest.fixture(scope="module")
def model(device):
    return tiny_model("llama", num_hidden_layers=1).to(device)


@pytest.mark.parametrize("enough", [True, False])
def test_tokens_are_those_of_stock(model, enough, monkeypatch):
    if enough:
        monkeypatch.setitem(shared_prefix.READINGS, "triton", replace(shared_prefix.READINGS["triton"], min_saved_bytes=1))
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        expected.append(output[0, len(prompt) :].tolist())
    with Engine(model, config=EngineConfig(attention_backend="triton", block_size=16)) as engine:
        assert generate(engine) == expected
        saved = engine.stats()["shared_prefix_tokens"]
        # Two of the later prompts share two blocks of 16 in each of the steps behind the one that prefills them.
        assert saved == (32 * (TOKENS - 1) if enough else 0)
        engine.reset_stats()
        assert engine.stats()["shared_prefix_tokens"] == 0
