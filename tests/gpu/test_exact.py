"""Exact mode on Triton: rows of linear layers and of attention, and log-probabilities of the engine, are the same bits in any batch."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

import hf_paged
from hf_paged import EngineConfig, SamplingParams
from hf_paged_kernels import fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_linear_layer_has_bits_of_its_own(device, dtype):
    generator = torch.Generator().manual_seed(0)
    for N, K in ((70, 96), (33, 100)):
        x, weight, bias = (torch.randn(*size, generator=generator).to(device, dtype) for size in ((70, K), (N, K), (N,)))
        y = fused.exact_linear(x, weight, bias, backend="triton")
        expected = x.double() @ weight.double().T + bias.double()
        torch.testing.assert_close(y.double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
        for first, last in ((0, 1), (3, 20), (65, 70)):
            assert torch.equal(fused.exact_linear(x[first:last], weight, bias, backend="triton"), y[first:last])


@pytest.mark.parametrize(
    "family, dtype",
    [
        ("llama", torch.float32),
        pytest.param("llama", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("gemma2", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_logprobs_of_a_mixture_are_those_of_one_forward(device, family, dtype):
    """Chunks, decodes and a cached prefix; windows of 8 in a layer of Gemma."""
    layers = 1 if family == "llama" else 2
    model = tiny_model(family, vocab_size=128, num_hidden_layers=layers).to(device, dtype)
    config = EngineConfig(exact=True, attention_backend="triton", block_size=16, max_batch_tokens=24, max_num_seqs=4)
    hf_paged.patch(model, config)
    engine = hf_paged.engine_of(model)
    shared = [(7 * i) % 90 + 3 for i in range(33)]
    prompts = [shared, shared[:20] + [5, 6]]
    for output in engine.generate(prompts, SamplingParams( max_tokens=3, logprobs=0, seed=1, ignore_eos=True)):
        for completion in output.outputs:
            ids = torch.tensor([output.prompt_token_ids + completion.token_ids], device=device)
            with torch.no_grad():
                logits = model(ids, logits_to_keep=4, use_cache=False).logits[0, :-1]
            logprobs = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[0, -3:, None])[:, 0].tolist()
            assert logprobs == [entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids)]
    assert engine.stats()["prefix_hit_tokens"] > 0
