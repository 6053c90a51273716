"""Recorded decode steps: the whole engine on Triton kernels, with stock's tokens, and everything that must not be replayed.

Without a GPU a stand-in records operations one by one (recording.py); the engine is the same.
"""

from __future__ import annotations

import pytest
import torch
from graph_parts import config, greedy, poisoned, prompts, recorders, small, stock, tokens, unchecked  # noqa: F401
from quantized_checkpoints import eight_bit_layer, save_quantized
from quantized_models import quantized
from recording import Recorder
from tiny_configs import MROPE
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from vision_inputs import batch

import hf_paged
from hf_paged import Engine, EngineConfig, InvalidArgument, SamplingParams, UnsupportedOption
from hf_paged.runtime import graphs

# ruff: noqa: F811  (fixtures of graph_parts)


@pytest.fixture(scope="module")
def model(device):
    return small("llama", device)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_tokens_are_stocks(device, recorders, family):
    """One, two, three and four sequences, padded to one, two and four; full attention, two block groups, sinks."""
    model = small(family, device)
    jobs, counts = prompts(5, 19, 33, 16), [6, 12, 4, 9]
    expected = [stock(model, job, count) for job, count in zip(jobs, counts)]
    with Engine(model, config=config()) as engine:
        assert tokens(engine.generate(jobs, [greedy(count) for count in counts])) == expected
        (recorder,) = recorders
        stats = engine.stats()
        assert stats["cuda_graphs"] == recorder.num_records == 3
        assert stats["cuda_graph_bytes"] > 0
        assert recorder.num_replays >= 9, "decode steps were not replayed"
        assert tokens(engine.generate(jobs[:2], greedy(5))) == [row[:5] for row in expected[:2]]
        assert recorder.num_records == 3, "a size was recorded again"
        assert "so far for 1, 2, 4" in str(hf_paged.explain(model))


def test_images_move_the_positions_of_recorded_steps(device, recorders):
    """One row has its tokens where they are, the others behind images of several shapes."""
    text = dict(MROPE, vocab_size=320, num_hidden_layers=1)
    model = tiny_model("qwen2_vl", text_config=text).to(device)
    rows = [[*range(20, 33)], [50, [1], *range(60, 64)], [[2], 70, [4], 71]]
    inputs = {name: value.to(device) for name, value in batch(model, "qwen2_vl", rows).items()}
    options = dict(inputs, max_new_tokens=6, do_sample=False)
    expected = model.generate(**options)
    hf_paged.patch(model, config=config())
    assert torch.equal(model.generate(**options), expected)
    assert recorders[0].num_replays >= 4
    again = dict(batch(model, "qwen2_vl", [[*range(20, 50)]]), max_new_tokens=6, do_sample=False)
    again = {name: value.to(device) if torch.is_tensor(value) else value for name, value in again.items()}
    mine = model.generate(**again)
    hf_paged.unpatch(model)
    assert torch.equal(mine, model.generate(**again)), "shifts of an earlier step are left"


def test_fused_layers_are_recorded_too(device, recorders):
    model = small("llama", device)
    jobs = prompts(5, 18)
    expected = [stock(model, job, 5) for job in jobs]
    with Engine(model, config=config(fuse=True)) as engine:
        assert hf_paged.explain(model).fused
        assert tokens(engine.generate(jobs, greedy(5))) == expected
        assert engine.stats()["cuda_graphs"] == 1 and recorders[0].num_replays >= 3


@pytest.mark.parametrize("scheme", ["int4", pytest.param("fp8", marks=pytest.mark.slow)])
def test_quantized_layers_are_recorded_too(device, recorders, scheme):
    """Norms, sums and the rounding of inputs inside; and values that are loaded later are replayed."""
    model, other = (quantized(small("llama", device, **seed), scheme) for seed in ({}, {"seed": 8}))
    jobs = prompts(5, 18)
    with Engine(model, config=config(fuse=True, cuda_graphs=False)) as engine:
        expected = tokens(engine.generate(jobs, greedy(5)))
    with Engine(model, config=config(fuse=True)) as engine:
        assert tokens(engine.generate(jobs, greedy(5))) == expected
        assert engine.stats()["cuda_graphs"] == 1 and recorders[0].num_replays >= 3
        model.load_state_dict(other.state_dict())
        after = tokens(engine.generate(jobs, greedy(5)))
        assert recorders[0].num_records == 1
    with Engine(other, config=config(fuse=True, cuda_graphs=False)) as engine:
        assert tokens(engine.generate(jobs, greedy(5))) == after != expected


@pytest.mark.slow
def test_quantized_experts_are_recorded_too(device, recorders, tmp_path):
    """Whatever the routing is, what is launched is the same."""
    stored = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    make = lambda name, N, K: eight_bit_layer(N, K, block=(None, None), name="weight_scale_inv", shape=())  # noqa: E731
    save_quantized(tiny_model("qwen3_moe", vocab_size=320, num_hidden_layers=1), tmp_path, stored, make)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval().to(device)
    jobs = prompts(5, 18)
    with Engine(model, config=config(fuse=True, cuda_graphs=False)) as engine:
        expected = tokens(engine.generate(jobs, greedy(5)))
    with Engine(model, config=config(fuse=True)) as engine:
        assert tokens(engine.generate(jobs, greedy(5))) == expected
        assert engine.stats()["cuda_graphs"] == 1 and recorders[0].num_replays >= 3


def test_requests_that_join_and_leave(model, recorders):
    jobs = prompts(4, 21, 9, 17, 12)
    expected = [stock(model, job, 3 + index) for index, job in enumerate(jobs)]
    with Engine(model, config=config()) as engine:
        finished, waiting = {}, list(enumerate(jobs))
        while waiting or engine.has_unfinished():
            if waiting:
                index, job = waiting.pop(0)
                engine.add(job, greedy(3 + index), request_id=str(index))
            for output in [*engine.step(), *engine.step()]:
                finished[output.request_id] = output
            engine.check_integrity()
        assert tokens(finished[str(index)] for index in range(len(jobs))) == expected


def test_sampled_rows_and_log_probabilities(model, recorders):
    """What is read of the logits is read before another graph writes there."""
    jobs = prompts(8, 15, 4)
    params = [
        SamplingParams(temperature=0.9, seed=4, n=2, max_tokens=5, ignore_eos=True, logprobs=2),
        greedy(4, logprobs=3, prompt_logprobs=1),
        greedy(6, repetition_penalty=1.3),
    ]
    with Engine(model, config=config()) as engine:
        mine = engine.generate(jobs, params)
    with Engine(model, config=config(cuda_graphs=False)) as engine:
        plain = engine.generate(jobs, params)
    assert len(recorders) == 1 and recorders[0].num_replays > 3
    assert tokens(mine) == tokens(plain)
    for one, other in zip(mine, plain):
        for a, b in zip(one.outputs, other.outputs):
            assert (a.logprobs is None) == (b.logprobs is None)
            for x, y in zip(a.logprobs or [], b.logprobs or []):
                assert x.keys() == y.keys()
                assert all(abs(x[token].logprob - y[token].logprob) < 1e-4 for token in x)


def test_new_values_in_old_places_are_replayed(device, recorders):
    """An optimizer step: the graph reads the live weights."""
    model = small("llama", device)
    (job,) = prompts(12)
    with Engine(model, config=config()) as engine:
        before = tokens(engine.generate([job], greedy(8)))
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(-1.5)
        after = tokens(engine.generate([job], greedy(8)))
        assert recorders[0].num_records == 1
    assert after == [stock(model, job, 8)] != before


@pytest.mark.parametrize("change", ["storage", "data", "module"])
def test_moved_weights_are_recorded_again(device, recorders, change):
    model = small("llama", device)
    (job,) = prompts(12)
    down = model.model.layers[0].mlp.down_proj
    with Engine(model, config=config()) as engine:
        before = tokens(engine.generate([job], greedy(8)))
        if change == "storage":
            down.weight = torch.nn.Parameter(-1.5 * down.weight.detach())
        elif change == "data":
            down.weight.data = -1.5 * down.weight.data
        else:
            new = torch.nn.Linear(down.in_features, down.out_features, bias=False).to(device)
            new.weight.data = -1.5 * down.weight.data
            model.model.layers[0].mlp.down_proj = new
        after = tokens(engine.generate([job], greedy(8)))
        assert recorders[0].num_records == 2
    assert after == [stock(model, job, 8)] != before


def test_a_cache_that_moves(model, recorders):
    jobs = prompts(5, 19, 33)
    expected = [stock(model, job, 9) for job in jobs]
    with Engine(model, config=config()) as engine:
        for job in jobs:
            engine.add(job, greedy(9))
        outputs, block = {}, engine._cache.bytes_per_block(0)
        changes = {4: lambda: engine.resize_kv_cache(9 * block), 6: engine.sleep, 8: lambda: engine.resize_kv_cache("1MiB")}
        for step in range(60):
            changes.get(step, lambda: None)()
            if step == 6:
                assert engine.stats()["cuda_graphs"] == engine.stats()["cuda_graph_bytes"] == 0
            for output in engine.step():
                outputs[output.request_id] = output
            if not engine.has_unfinished():
                break
        assert recorders[0].num_records >= 2
        assert sorted(tokens(outputs.values())) == sorted(expected)


def test_hooks_see_every_step(model, recorders):
    """Those of the model and those of a request; the others' steps are recorded as before and after."""
    (job,) = prompts(12)
    seen, own = [], []
    layer = model.model.layers[0]
    with Engine(model, config=config()) as engine:
        expected = tokens(engine.generate([job], greedy(6)))
        replays = recorders[0].num_replays
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(1))
        assert tokens(engine.generate([job], greedy(6))) == expected
        assert len(seen) == 6 and recorders[0].num_replays == replays
        explained = hf_paged.explain(model)
        assert explained.off["cuda graphs"] == "forward hooks on the model are to be called in every step"
        handle.remove()
        engine.add(job, greedy(6), forward_hooks={"model.layers.0": lambda rows, positions: own.append(positions.tolist())})
        while engine.has_unfinished():
            engine.step()
        assert own == [list(range(12)), *([position] for position in range(12, 17))]
        assert recorders[0].num_replays == replays
        assert tokens(engine.generate([job], greedy(6))) == expected
        assert recorders[0].num_replays > replays and "cuda graphs" not in hf_paged.explain(model).off


def test_a_replaced_forward_is_called_in_every_step(device, recorders):
    model = small("llama", device)
    (job,) = prompts(12)
    calls, mlp = [], model.model.layers[0].mlp
    plain = mlp.forward
    with Engine(model, config=config()) as engine:
        engine.generate([job], greedy(4))
        mlp.forward = lambda x: calls.append(1) or plain(x)
        engine.generate([job], greedy(4))
        assert len(calls) == 4
        assert "was replaced" in hf_paged.explain(model).off["cuda graphs"]
        del mlp.forward


def test_a_forward_that_waits_for_the_device_runs_as_it_is(device, recorders):
    model = small("llama", device)

    class Waiting(type(model.model.norm)):
        def forward(self, x):
            return super().forward(x) * (1.0 if float(x.abs().max()) >= 0 else 2.0)

    model.model.norm.__class__ = Waiting
    jobs = prompts(5, 19)
    expected = [stock(model, job, 5) for job in jobs]
    with Engine(model, config=config()) as engine:
        assert tokens(engine.generate(jobs, greedy(5))) == expected
        reason = hf_paged.explain(model).off["cuda graphs"]
        assert "waits for the device" in reason and "_local_scalar_dense" in reason
        assert (recorders[0].num_warm_ups, recorders[0].num_records) == (1, 0) and engine.stats()["cuda_graphs"] == 0
        assert hf_paged.explain(model).graphs is None


def test_a_failed_recording_harms_nobody(model, recorders, monkeypatch):
    jobs = prompts(5, 19, 8)
    expected = [stock(model, job, 5) for job in jobs]
    with Engine(model, config=config()) as engine:
        engine.generate(jobs[:1], greedy(3))
        recorder = recorders[0]
        monkeypatch.setattr(type(recorder), "record", lambda self, run: (_ for _ in ()).throw(MemoryError("no room")))
        assert tokens(engine.generate(jobs, greedy(5))) == expected
        assert hf_paged.explain(model).off["cuda graphs"].endswith("failed with MemoryError: no room")


def test_a_recording_that_gives_other_logits_is_not_used(device, recorders, monkeypatch):
    """A new module is a new chance."""
    model = small("llama", device)
    (job,) = prompts(9)
    expected = [stock(model, job, 4)]
    with Engine(model, config=config()) as engine:
        record = Recorder.record
        with monkeypatch.context() as patched:
            patched.setattr(Recorder, "record", lambda self, run: lambda: record(self, run)() + 0.1)
            assert tokens(engine.generate([job], greedy(4))) == expected
            assert "gave other logits, off by" in hf_paged.explain(model).off["cuda graphs"]
        assert tokens(engine.generate([job], greedy(4))) == expected
        assert engine.stats()["cuda_graphs"] == 0
        model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach().clone())
        assert tokens(engine.generate([job], greedy(4))) == expected
        assert engine.stats()["cuda_graphs"] == 1 and "cuda graphs" not in hf_paged.explain(model).off


def test_layers_with_a_state_are_not_recorded(device, recorders):
    model = small("mamba", device)
    (job,) = prompts(12)
    expected = [stock(model, job, 5)]
    with Engine(model, config=config()) as engine:
        assert tokens(engine.generate([job], greedy(5))) == expected
        assert hf_paged.explain(model).off["cuda graphs"] == "its layers keep a state"
        assert not recorders


def test_graphs_are_for_cuda():
    with pytest.raises(InvalidArgument, match="cuda_graphs must be True, False or None"):
        EngineConfig(cuda_graphs="yes")
    with pytest.raises(UnsupportedOption, match="cuda_graphs: the model is on cpu"):
        Engine(tiny_model("llama"), config=EngineConfig(cuda_graphs=True))
    assert EngineConfig().cuda_graphs is None


def test_the_ladder():
    assert graphs.ladder(1) == [1] and graphs.ladder(3) == [1, 2, 3] and graphs.ladder(8) == [1, 2, 4, 8]
    assert graphs.ladder(20) == [1, 2, 4, 8, 16, 20]
    many = graphs.ladder(2000)
    assert many[-1] == 2000 and all(b <= 1.13 * a for a, b in zip(many, many[1:]) if a >= 64)
