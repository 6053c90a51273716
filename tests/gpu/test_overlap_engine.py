"""The engine on Triton's kernels with overlapping steps: tokens stay on the device, and nothing waits for it."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import torch
from late_results import Recorder
from tiny_models import tiny_model
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_paged import Engine, EngineConfig, SamplingParams

PROMPTS = [[5, 6, 7], [8] * 5, [9, 10]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=1),
    SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, repetition_penalty=1.4, presence_penalty=0.5),
    SamplingParams(n=2, seed=3, max_tokens=4, ignore_eos=True, temperature=1.3, top_k=40, frequency_penalty=0.7),
]
_READS = (Tensor.item, Tensor.tolist, Tensor.nonzero, torch.nonzero, Tensor.cpu)
_READS += (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__iter__, Tensor.unique)


class _NoReads(TorchFunctionMode):
    """While entered, nobody but Triton's interpreter may read the values of a tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _READS and not _in_interpreter():
            raise AssertionError(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


def _in_interpreter() -> bool:
    frame = sys._getframe()
    while frame is not None and "interpreter" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


@contextmanager
def no_waiting(device: torch.device):
    """Scope in which waiting for the device is an error."""
    if device.type != "cuda":
        with _NoReads():
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Unwaiting(Recorder):
    """Launches steps without waiting for the device."""

    def launch(self, plan, hooks, previous, clock):
        with no_waiting(self._executor._runner.cache.device):
            return super().launch(plan, hooks, previous, clock)


def test_tokens_that_stay_on_the_device_give_those_of_one_step_at_a_time(device):
    with Engine(tiny_model("qwen3", vocab_size=320, num_hidden_layers=1), config=EngineConfig(block_size=16)) as engine:
        expected = engine.generate(PROMPTS, PARAMS)
    model = tiny_model("qwen3", vocab_size=320, num_hidden_layers=1).to(device)
    config = EngineConfig(block_size=16, attention_backend="triton", overlap=True)
    with Engine(model, config=config) as engine:
        record = Unwaiting(engine)
        outputs = engine.generate(PROMPTS, PARAMS)
        assert record.steps_ahead() == [1] * 3 + [0]  # penalties make nobody wait here
    for output, known in zip(outputs, expected):
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in known.outputs]
    for entry, known in zip(outputs[0].outputs[0].logprobs, expected[0].outputs[0].logprobs):
        assert entry.keys() == known.keys()
        assert all(abs(entry[token].logprob - known[token].logprob) < 1e-3 for token in entry)
