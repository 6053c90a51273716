"""The benchmark of mixed adapters: a short run of it."""

from __future__ import annotations

import csv

import pytest
from peft_adapters import WARNINGS
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged.benchmarks import schema
from hf_paged.benchmarks.hetero import adapters


@pytest.mark.filterwarnings(*WARNINGS)
def test_systems_are_measured_side_by_side(tmp_path, capsys):
    folder = tmp_path / "model"
    tiny_model("llama", vocab_size=320).save_pretrained(folder)
    tiny_tokenizer(320).save_pretrained(folder)
    sizes = ["--adapters", "3", "--rank", "4", "--requests", "2", "--prompt", "5", "--output", "4", "--rounds", "1"]
    adapters.main(["--model", str(folder), "--threads", "1", "--stock", "--out", str(tmp_path), *sizes])
    with (tmp_path / "hetero.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == schema.COLUMNS
    values = {(row["system"], row["metric"]): float(row["p50"]) for row in rows}
    assert {system for system, _ in values} == {"mixed", "in turn", "PEFT in turn", "no adapter"}
    assert all(value > 0 for value in values.values())
    assert "times in turn" in capsys.readouterr().out
