"""The benchmarks of mixed batches: a short run of each."""

from __future__ import annotations

import csv

import pytest
from peft_adapters import WARNINGS
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

import hf_paged_kernels as kernels
from hf_paged.benchmarks import schema
from hf_paged.benchmarks.hetero import adapters, grouped, mixed, score


@pytest.fixture
def run(tmp_path):
    """Runs a benchmark on a tiny model; returns the rows it wrote, by (workload, system, metric, unit)."""
    folder = tmp_path / "model"
    model = tiny_model("llama", vocab_size=320)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tiny_tokenizer(320).save_pretrained(folder)

    def run(part, *sizes) -> dict[tuple[str, str, str, str], float]:
        part.main(["--model", str(folder), "--threads", "1", "--rounds", "1", "--out", str(tmp_path), *map(str, sizes)])
        with (tmp_path / "hetero.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == schema.COLUMNS
        values = {tuple(row[name] for name in ("workload", "system", "metric", "unit")): float(row["p50"]) for row in rows}
        assert all(value > 0 for value in values.values())
        return values

    return run


def systems_of(values) -> set[str]:
    return {system for _, system, *_ in values}


@pytest.mark.filterwarnings(*WARNINGS)
def test_adapters(run, capsys):
    sizes = ("--adapters", 3, "--rank", 4, "--requests", 2, "--prompt", 5, "--output", 4)
    assert systems_of(run(adapters, "--stock", *sizes)) == {"mixed", "in turn", "PEFT in turn", "no adapter"}
    assert "times in turn" in capsys.readouterr().out


@pytest.mark.filterwarnings(*WARNINGS)
def test_jobs_of_every_kind(run, capsys):
    values = run(mixed, "--jobs", 1, "--rank", 4, "--prompt", 8, "--output", 6)
    kinds = {"chat", "JSON", "LoRA", "embedding", "choice"}
    for system in ("mixed", "in turn"):
        tails = {name.rpartition(", ")[2] for name, which, metric, unit in values if (which, metric, unit) == (system, "latency_p95", "s")}
        assert tails == kinds
    assert ("7 jobs of 5 kinds", "mixed", "speed-up", "1") in values
    assert "7 jobs: mixed" in capsys.readouterr().out


def test_scores(run):
    values = run(score, "--prompt", 40, "--continuations", 9, "--sample", 3)
    assert systems_of(values) == {"hf_paged", "stock, one by one", "stock, padded batches"}
    assert len([key for key in values if key[2] == "speed-up"]) == 1, "two rows of it, told apart by their baseline"


def test_shared_beginnings(run):
    values = run(grouped, "--requests", 3, "--shared", 64, "--own", 4, "--output", 5, "--sample", 2)
    groups = {"grouped"} if kernels.supports("cpu", "cpu") else set()  # the reference kernels have none
    assert systems_of(values) == {"cached", "no cache"} | groups
    assert {metric for _, _, metric, _ in values} == {"output_tokens", "decode_tokens", "speed-up"}
