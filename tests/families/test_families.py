"""Supported families against stock transformers in fp32: the same greedy tokens, logits within 1e-4."""

from __future__ import annotations

import copy

import pytest
from family_checks import Comparison
from tiny_models import tiny_model

import hf_paged
from hf_paged import SamplingParams

# Every kind of layer and mask; coverage.py does the same for all families.
LABELS = [
    "llama", "llama-mha-bias", "llama-tied-llama3-rope", "mistral", "mistral-window", "qwen2", "qwen2-window", "qwen3",
    "gemma", "gemma2", "gemma3_text", "phi3", "phi3-window", "olmo2", "gpt_oss", "qwen3_moe", "mixtral",
    "mixtral-window", "llama4_text", "phimoe", "qwen2_moe-window", "modernbert-decoder", "gemma3n_text", "diffllama",
    "hrm_text", "gpt2", "bert",
]  # fmt: skip


@pytest.fixture(scope="module", params=LABELS)
def family(request):
    return Comparison(tiny_model(request.param))


def test_tokens_vary(family):
    family.check_is_telling()


def test_chunked_prefill_mixed_with_decodes_and_prefix_hits(family):
    family.check_chunks_and_prefix_hits()


def test_preemption(family):
    family.check_preemption()


def test_reference_kernels_without_fusion(family):
    family.check_reference_kernels()


def test_generate_returns_stock_tokens_and_logits(family):
    family.check_generate()


def test_unpatch_restores_every_bit(family):
    model = family.model
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    with hf_paged.Engine(model) as engine:
        engine.generate([[5, 6, 7]], SamplingParams(max_tokens=3))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all((after[name] == before[name]).all() for name in before)
    assert [type(module) for module in model.modules()] == kinds
