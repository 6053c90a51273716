"""Rows driven from outside: logits of stock, blocks shared and given back, beside the engine's own requests."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny_models import tiny_model

import hf_paged
from hf_paged import CacheFull, EngineConfig, InvalidArgument, RequestTooLarge, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module", params=["qwen3", "gemma2"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def engine(model):
    with hf_paged.Engine(model, config=EngineConfig(block_size=16, max_batch_tokens=24)) as engine:
        yield engine
        engine.check_integrity()


def last_logits(chunks) -> dict[int, torch.Tensor]:
    return {span.row: chunk.result[i] for chunk in chunks for i, span in enumerate(chunk.spans)}


def check(model, chunks, rows):
    found = last_logits(chunks)
    for row, tokens in rows.items():
        torch.testing.assert_close(found[row], model(torch.tensor([tokens])).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_rows_compute_fork_and_take_back_as_stock(model, engine):
    long, short = [5, 6, 7] * 13, [9, 8, 3]
    rows = engine.hold(2)
    check(model, rows.forward([long, short]), {0: long, 1: short})
    rows.reorder([0, 1, 0, 0])
    engine.check_integrity()
    new = [[11], [12], [13], [14, 15]]
    check(model, rows.forward(new), {i: (short if i == 1 else long) + new[i] for i in range(4)})
    engine.check_integrity()
    rows.keep_past = True
    rows.forward([[3] * 9, [], [], []])
    rows.truncate(0, len(long) + 3)
    check(model, rows.forward([[21, 22], [], [], []]), {0: long + [11, 3, 3, 21, 22]})
    engine.check_integrity()
    rows.close()
    assert engine.stats()["kv_bytes_in_use"] == 0


def test_expendable_rows_give_their_blocks_to_whoever_lacks_them():
    model = tiny_model("qwen3")
    memory = 10 * 16 * 3 * 2 * 2 * 12 * 4  # ten blocks
    with hf_paged.Engine(model, config=EngineConfig(block_size=16, kv_cache_memory=memory)) as engine:
        expected = engine.generate([[7] * 120], GREEDY)[0].outputs[0].token_ids
        rows = engine.hold(3, expendable=True)
        rows.forward([[5] * 50, [6] * 50, []])
        rows.reorder([0, 1, 1])
        assert engine.generate([[7] * 120], GREEDY)[0].outputs[0].token_ids == expected  # eight blocks
        assert rows.lengths.count(0) > 0
        engine.check_integrity()
        for row, length in enumerate(rows.lengths):
            rows.truncate(row, 0)
        rows.forward([[5] * 50, [6] * 50, []])
        kept = engine.hold(1)
        kept.forward([[8] * 130])  # nine blocks
        assert rows.lengths == [0, 0, 0] and kept.lengths == [130]
        check(model, rows.forward([[5] * 9, [], []]), {0: [5] * 9})
        with pytest.raises(CacheFull):  # those that are kept give nothing
            rows.forward([[5] * 9, [], []])
        engine.check_integrity()


def test_a_fork_copies_the_last_partial_block_only(engine):
    rows = engine.hold(1)
    rows.forward([[7] * 40])  # two full blocks and half of a third
    full = [layer.window for layer in engine.model.layers if layer.window is None]
    group = 0 if len(full) == len(engine.model.layers) else 1  # gemma2's first layer slides
    before = engine._scheduler.stats()["blocks_in_use"]
    rows.reorder([0, 0, 0])
    assert engine._scheduler.stats()["blocks_in_use"] == before
    rows.forward([[1], [2], [3]])
    assert engine._scheduler.stats()["blocks_in_use"][group] == before[group] + 2
    rows.close()


def test_truncated_rows_leave_the_prefix_cache_right(model, engine):
    prompt = list(range(20, 70))
    rows = engine.hold(1)
    rows.keep_past = True
    rows.forward([prompt])
    rows.truncate(0, 20)
    rows.forward([[3] * 30])
    rows.close()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, 50:].tolist()
    assert engine.generate([prompt], GREEDY)[0].outputs[0].token_ids == expected


def test_requests_go_on_beside_held_rows_and_wait_for_their_blocks(model):
    layers = 3
    memory = 160 * layers * 2 * 2 * 12 * 4  # about 160 tokens
    config = EngineConfig(block_size=16, kv_cache_memory=memory, max_batch_tokens=64)
    prompts = [[4, 5, 6] * 9, [7] * 40]
    expected = [model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False)[0, len(p) :].tolist() for p in prompts]
    with hf_paged.Engine(model, config=config) as engine:
        done = {}
        for prompt in prompts:
            engine.add(prompt, GREEDY, on_output=lambda out: done.__setitem__(out.request_id, out))
        engine.step()
        rows = engine.hold(1, publish=False)
        rows.forward([[9] * 130])  # takes the running requests' blocks
        for _ in range(4):
            engine.step()
            engine.check_integrity()
        rows.close()
        while engine.has_unfinished():
            engine.step()
        assert [done[key].outputs[0].token_ids for key in sorted(done)] == expected
        engine.check_integrity()


def test_what_cannot_be_held_is_refused_and_frees_everything(model):
    config = EngineConfig(block_size=16, kv_cache_memory=64 * 3 * 2 * 2 * 12 * 4, max_model_len=100)
    with hf_paged.Engine(model, config=config) as engine:
        rows = engine.hold(2)
        with pytest.raises(RequestTooLarge, match="row 1"):
            rows.forward([[1], [1] * 101])
        with pytest.raises(InvalidArgument, match="token id 5000"):
            rows.forward([[5000], []])
        if model.config.model_type == "qwen3":
            with pytest.raises(CacheFull, match="held"):
                rows.forward([[1] * 50, [2] * 50])
        rows.close()
        assert engine.stats()["kv_bytes_in_use"] == 0
        engine.check_integrity()


def test_rows_nobody_holds_any_more_are_freed(engine):
    rows = engine.hold(3)
    rows.forward([[1, 2], [3], [4]])
    assert engine.stats()["kv_bytes_in_use"] > 0
    del rows
    gc.collect()
    engine.step()
    assert engine.stats()["kv_bytes_in_use"] == 0
