"""The engine with kernels for sampling: the tokens of the engine on CPU, whatever requests ask for, one step ahead or not."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged import Engine, EngineConfig, SamplingParams

PROMPTS = [[5, 200, 5], [77, 3, 3], [300, 12], [8, 150], [61, 61]]
PARAMS = [
    SamplingParams(temperature=0, repetition_penalty=1.4, max_tokens=4, ignore_eos=True, logprobs=1),
    SamplingParams(seed=1, top_p=0.9, frequency_penalty=1.2, presence_penalty=0.5, max_tokens=4, ignore_eos=True, n=2),
    SamplingParams(seed=2, top_k=20, temperature=1.6, logit_bias={40: 6.0}, frequency_penalty=2.0, max_tokens=4),
    SamplingParams(seed=3, min_p=0.05, min_tokens=3, max_tokens=4, allowed_token_ids=[*range(40, 90), 2]),
    SamplingParams(temperature=0, bad_words=["a", "th"], max_tokens=3, ignore_eos=True),
]


def halve(token_ids, logits):
    return logits / (1 + len(token_ids) % 2)


def tokens(model, backend, **config):
    """Of every completion of every request, one with a processor of the user's among them."""
    with Engine(model, tiny_tokenizer(320), EngineConfig(attention_backend=backend, **config)) as engine:
        ids = [engine.add(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
        ids.append(engine.add([4, 4], PARAMS[2], logits_processors=[halve]))
        outputs = {}
        while engine.has_unfinished():
            for output in engine.step():
                outputs[output.request_id] = output
        assert not any(output.error for output in outputs.values())
        sampler = engine._executor._sampler._device_sampler
        assert sampler is None or sampler.idle  # what the device kept of the requests is freed
        return [[completion.token_ids for completion in outputs[request].outputs] for request in ids]


@pytest.fixture(scope="module")
def expected():
    return tokens(tiny_model("qwen3", vocab_size=320, num_hidden_layers=1), "auto")


@pytest.mark.parametrize(
    "config",
    [
        {"overlap": True},
        pytest.param({"overlap": False}, marks=pytest.mark.slow),
        pytest.param({"speculation": "ngram"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tokens_are_those_of_the_cpu(device, expected, config):
    model = tiny_model("qwen3", vocab_size=320, num_hidden_layers=1).to(device)
    assert tokens(model, "triton", **config) == expected
