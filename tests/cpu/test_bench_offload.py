"""The benchmark of host memory behind the cache: a short run of it."""

from __future__ import annotations

import csv

from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged.benchmarks import schema
from hf_paged.benchmarks.engine import offload


def test_both_sides_are_measured_side_by_side(tmp_path, capsys):
    folder = tmp_path / "model"
    tiny_model("llama", vocab_size=320).save_pretrained(folder)
    tiny_tokenizer(320).save_pretrained(folder)
    sizes = ["--requests", "4", "--prompt", "32", "--output", "32", "--rounds", "1"]
    offload.main(["--model", str(folder), "--threads", "1", "--out", str(tmp_path), *sizes])
    with (tmp_path / "offload.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == schema.COLUMNS
    assert {row["workload"] for row in rows} == {"prefixes", "preemption"}
    assert {row["system"] for row in rows} == {"host memory", "none"}
    assert all(float(row["p50"]) > 0 for row in rows)
    assert "times" in capsys.readouterr().out
