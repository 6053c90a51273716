"""The benchmarks of forms and of the waiting queue: short runs of them."""

from __future__ import annotations

import csv

from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged.benchmarks import schema
from hf_paged.benchmarks.engine import structured, waiting


def saved(folder) -> str:
    model = tiny_model("llama", vocab_size=320)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tiny_tokenizer(320).save_pretrained(folder)
    return str(folder)


def values(path) -> dict[tuple[str, str, str], float]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == schema.COLUMNS
    return {(row["workload"], row["system"], row["metric"]): float(row["p50"]) for row in rows}


def test_forms(tmp_path, capsys):
    sizes = ["--rows", "2", "--rounds", "1", "--threads", "1"]
    structured.main(["--model", saved(tmp_path / "model"), "--out", str(tmp_path), *sizes])
    found = values(tmp_path / "structured.csv")
    assert found["long keys, 2 at once", "jumping", "steps"] < 0.5 * found["long keys, 2 at once", "step by step", "steps"]
    assert "times faster" in capsys.readouterr().out


def test_waiting(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(waiting, "LONG", 200)
    sizes = ["--prefixes", "4", "--requests", "3", "--length", "64", "--rounds", "1"]
    waiting.main(["--model", saved(tmp_path / "model"), "--threads", "1", "--out", str(tmp_path), *sizes])
    found = values(tmp_path / "waiting.csv")
    cached = {system: found["4 prefixes", system, "cached prompt tokens"] for system in ("together", "as they come")}
    assert cached["together"] > cached["as they come"]
    assert all(found["200 waiting", policy, "schedule"] > 0 for policy in waiting.POLICIES)
    assert "times faster together" in capsys.readouterr().out
