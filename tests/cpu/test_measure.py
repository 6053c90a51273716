"""The KV cache's share of a GPU's memory, on a GPU that is not there."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForSequenceClassification

import hf_paged
from hf_paged import EngineConfig, InvalidArgument
from hf_paged.engine import build, measure
from hf_paged.runtime.graphs import GRAPH_BYTES
from hf_paged.runtime.runner import ModelRunner

LIMITS = build.Limits(max_batch_tokens=96, max_num_seqs=8, max_model_len=40)
GIB = 1 << 30


class Meter:
    """A device of 10 GiB with 2 in use, whose steps need what they are said to need."""

    def __init__(self, adapter, needs: list[int]):
        self.adapter, self.needs, self.steps = adapter, list(needs), []

    def total(self) -> int:
        return 10 * GIB

    def in_use(self) -> int:
        return 2 * GIB

    def peak(self, run) -> int:
        seen = []
        forward = self.adapter.forward
        self.adapter.forward = lambda context, rows: seen.append((context, len(rows))) or forward(context, rows)
        try:
            run()
        finally:
            del self.adapter.forward
        ((context, num_rows),) = seen
        self.steps.append((context.plan.num_new, num_rows))
        return self.needs.pop(0)


@pytest.fixture(params=["llama", "gemma3_text", "mamba"])
def model(request):
    model = tiny_model(request.param, vocab_size=320)
    hf_paged.patch(model)
    yield model
    hf_paged.unpatch(model)


def runner_of(model):
    adapter = hf_paged.hf.patch.patch_of(model).adapter
    config = EngineConfig(kv_cache_memory="1MiB", max_batch_tokens=96, max_num_seqs=8)
    cache, _ = build.build(adapter, config, 40)
    return ModelRunner(adapter, cache, build._inputs(adapter, config, cache, LIMITS), backend="auto")


def test_the_cache_gets_what_the_largest_step_leaves(model):
    runner = runner_of(model)
    meter = Meter(runner.model, [3 * GIB, GIB // 2])
    calls = []
    model.model.layers[0].register_forward_hook(lambda *args: calls.append(args)) if hasattr(model, "model") else None
    budget = measure.kv_budget(runner, meter, 0.8, graphs=True, **LIMITS._asdict())
    assert meter.steps == [([39, 39, 18], 8), ([1] * 8, 8)]
    assert budget == 8 * GIB - 2 * GIB - 3 * GIB - GIB // 2 - 4 * GRAPH_BYTES  # of 1, 2, 4, 8
    assert runner.cache.bytes_allocated == runner.cache.states.bytes_allocated == 0
    assert not calls, "hooks of the user's saw a step that is nobody's"


def test_a_model_that_generates_nothing_samples_nothing():
    config = tiny_config("llama", vocab_size=320)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).eval()
    hf_paged.patch(model)
    meter = Meter(runner_of(model).model, [3 * GIB])
    assert measure.kv_budget(runner_of(model), meter, 0.8, graphs=False, **LIMITS._asdict()) == 3 * GIB
    assert hf_paged.hf.patch.patch_of(model).adapter.why_unrecordable == "it generates no tokens"


def test_without_graphs_there_is_more(model):
    meter = Meter(runner_of(model).model, [3 * GIB])
    budget = measure.kv_budget(runner_of(model), meter, 0.8, graphs=False, **LIMITS._asdict())
    assert budget == 3 * GIB


def test_no_memory_for_a_cache_is_an_error_that_says_why(model):
    runner = runner_of(model)
    with pytest.raises(InvalidArgument, match=r"kv_cache_memory: .*2.00 GiB are in use.* needs 7.00 GiB"):
        measure.kv_budget(runner, Meter(runner.model, [7 * GIB]), 0.8, graphs=False, **LIMITS._asdict())


def test_no_memory_for_a_step_is_an_error_that_says_what_to_do(model):
    class Full(Meter):
        def peak(self, run):
            raise torch.OutOfMemoryError("CUDA out of memory")

    runner = runner_of(model)
    with pytest.raises(InvalidArgument, match="max_batch_tokens: there is no memory for a step of 96 tokens"):
        measure.kv_budget(runner, Full(runner.model, []), 0.8, graphs=True, **LIMITS._asdict())
    assert runner.cache.bytes_allocated == 0
