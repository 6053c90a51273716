"""Recorded decode steps with adapters: one recording serves any mix of them, with PEFT's tokens."""

from __future__ import annotations

import peft
import pytest
import torch
from graph_parts import config, greedy, poisoned, prompts, recorders, small, tokens, unchecked  # noqa: F401
from peft_adapters import WARNINGS

import hf_paged
from hf_paged import Engine
from hf_paged.hf.peft_bank.sites import RecordedRows

# ruff: noqa: F811  (fixtures of graph_parts)

pytestmark = pytest.mark.filterwarnings(*WARNINGS)


@pytest.fixture(autouse=True)
def poisoned_rows(monkeypatch):
    """Between two steps the buffers name rows and adapters that are wrong."""
    fill = RecordedRows.fill

    def poison_first(self, *args):
        self._buffer.fill_(1)
        fill(self, *args)

    monkeypatch.setattr(RecordedRows, "fill", poison_first)


LINEAR = ["q_proj", "down_proj"]


def save_adapter(folder, device, seed: int = 0, **options) -> str:
    """A LoRA adapter of random weights for `small("llama")`."""
    torch.manual_seed(seed)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **{"target_modules": LINEAR, **options})
    peft.get_peft_model(small("llama", device), lora).save_pretrained(folder)
    return str(folder)


def alone(device, folder: str | None, prompt: list[int], count: int) -> list[int]:
    """Stock's tokens with an adapter, by PEFT."""
    model = small("llama", device)
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, folder).eval()
    ids = torch.tensor([prompt], device=device)
    rows = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return rows[0, len(prompt) :].tolist()


def test_any_mix_of_adapters_is_replayed(device, recorders, tmp_path):
    """One recording for each number of sequences, whoever they are; ranks, scales (DoRA) and the head differ."""
    folders = {
        "a": save_adapter(tmp_path / "a", device, 1, r=4),
        "b": save_adapter(tmp_path / "b", device, 2, r=12, target_modules=[*LINEAR, "lm_head"]),
        "c": save_adapter(tmp_path / "c", device, 3, r=2, use_dora=True),
        None: None,
    }
    jobs = prompts(5, 3, 4, 2)
    expected = {name: [alone(device, folder, job, 4) for job in jobs] for name, folder in folders.items()}
    assert len({tuple(rows[0]) for rows in expected.values()}) == 4, "the adapters change nothing"
    with Engine(small("llama", device), config=config(fuse=True)) as engine:
        for name in ("a", "b", "c"):
            engine.load_adapter(name, folders[name])
        for mix in (["a", "b", None, "c"], ["c", "a", "a", "b"], ["b"] * 4):
            outputs = tokens(engine.generate(jobs, greedy(4), adapter=mix))
            assert outputs == [expected[name][place] for place, name in enumerate(mix)], mix
        (recorder,) = recorders
        assert recorder.num_records == 1 and recorder.num_replays >= 8
        assert tokens(engine.generate(jobs, greedy(4))) == expected[None]
        assert [one.num_records for one in recorders] == [1, 1], "steps without adapters have graphs of their own"
        assert engine.stats()["cuda_graphs"] == 2
        described = str(hf_paged.explain(engine.model.module))
        assert "with adapters so far for 4" in described and "off     cuda graphs" not in described


@pytest.mark.slow
def test_adapters_that_come_and_go_are_recorded_again(device, recorders, tmp_path):
    folders = [save_adapter(tmp_path / str(rank), device, rank, r=rank) for rank in (2, 20)]
    jobs = prompts(3, 2)
    expected = [[alone(device, folder, job, 3) for job in jobs] for folder in folders]
    with Engine(small("llama", device), config=config(fuse=True)) as engine:
        for turn in (0, 1):
            engine.load_adapter("one", folders[turn])
            assert tokens(engine.generate(jobs, greedy(3), adapter="one")) == expected[turn]
            engine.unload_adapter("one")
        assert sum(recorder.num_records for recorder in recorders) == 2


def test_new_values_of_an_adapter_in_training_are_replayed(device, recorders, tmp_path):
    folder = save_adapter(tmp_path / "a", device, 1, r=4)
    owner = peft.PeftModel.from_pretrained(small("llama", device), folder, is_trainable=True)
    jobs = prompts(3, 2)
    with Engine(small("llama", device), config=config(fuse=True)) as engine:
        engine.load_adapter("one", owner)
        before = tokens(engine.generate(jobs, greedy(3), adapter="one"))
        with torch.no_grad():
            for name, weight in owner.named_parameters():
                if "lora_B" in name:
                    weight.mul_(-3)
        owner.save_pretrained(tmp_path / "later")
        expected = [alone(device, str(tmp_path / "later"), job, 3) for job in jobs]
        assert tokens(engine.generate(jobs, greedy(3), adapter="one")) == expected != before
        assert recorders[0].num_records == 1, "the values are in the same places"


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(modules_to_save=["lm_head"]), dict(target_modules=["q_proj", "embed_tokens"])])
def test_adapters_that_the_host_must_place_are_not_recorded(device, recorders, tmp_path, options):
    """What takes a layer's place, or looks rows up, is not computed by a kernel that reads whose rows there are."""
    folder = save_adapter(tmp_path / "a", device, 1, r=4, **options)
    other = save_adapter(tmp_path / "b", device, 2, r=4)
    jobs = prompts(3, 2)
    expected = [[alone(device, one, job, 3) for job in jobs] for one in (folder, other)]
    with Engine(small("llama", device), config=config(fuse=True)) as engine:
        engine.load_adapter("whole", folder)
        engine.load_adapter("low", other)
        assert tokens(engine.generate(jobs, greedy(3), adapter="whole")) == expected[0]
        assert tokens(engine.generate(jobs, greedy(3), adapter=["low", "whole"])) == [expected[1][0], expected[0][1]]
        assert not recorders
        assert tokens(engine.generate(jobs, greedy(3), adapter="low")) == expected[1]
        assert recorders[0].num_records == 1, "one of which that is not true is recorded, though the other is there"
        assert "off     cuda graphs with whole: " in str(hf_paged.explain(engine.model.module))
