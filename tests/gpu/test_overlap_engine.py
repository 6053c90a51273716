"""The engine on Triton's kernels with overlapping steps: rules and draws on tokens that only the device knows yet."""

from __future__ import annotations

from late_results import Recorder
from tiny_models import tiny_model

from hf_paged import Engine, EngineConfig, SamplingParams

PROMPTS = [[5, 6, 7], [8] * 5, [9, 10]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=1),
    SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, repetition_penalty=1.4, presence_penalty=0.5),
    SamplingParams(n=2, seed=3, max_tokens=4, ignore_eos=True, temperature=1.3, top_k=40, frequency_penalty=0.7),
]


def test_tokens_that_stay_on_the_device_give_those_of_one_step_at_a_time(device):
    with Engine(tiny_model("qwen3", vocab_size=320, num_hidden_layers=1), config=EngineConfig(block_size=16)) as engine:
        expected = engine.generate(PROMPTS, PARAMS)
    model = tiny_model("qwen3", vocab_size=320, num_hidden_layers=1).to(device)
    config = EngineConfig(block_size=16, attention_backend="triton", overlap=True)
    with Engine(model, config=config) as engine:
        record = Recorder(engine)
        outputs = engine.generate(PROMPTS, PARAMS)
        assert record.steps_ahead() == [1] * 3 + [0]  # penalties make nobody wait here
    for output, known in zip(outputs, expected):
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in known.outputs]
    for entry, known in zip(outputs[0].outputs[0].logprobs, expected[0].outputs[0].logprobs):
        assert entry.keys() == known.keys()
        assert all(abs(entry[token].logprob - known[token].logprob) < 1e-3 for token in entry)
