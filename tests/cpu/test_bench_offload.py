"""The benchmarks of host memory and a disk behind the cache: a short run of each."""

from __future__ import annotations

import csv
import json

from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged.benchmarks import schema
from hf_paged.benchmarks.engine import disk, offload
from hf_paged.engine.offload import HostOffload


def test_both_sides_are_measured_side_by_side(tmp_path, capsys):
    folder = tmp_path / "model"
    tiny_model("llama", vocab_size=320).save_pretrained(folder)
    tiny_tokenizer(320).save_pretrained(folder)
    sizes = ["--requests", "6", "--prompt", "64", "--output", "40", "--rounds", "1"]
    offload.main(["--model", str(folder), "--threads", "1", "--out", str(tmp_path), *sizes])
    with (tmp_path / "offload.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == schema.COLUMNS
    assert {row["workload"] for row in rows} == {"prefixes", "long", "urgent"}
    assert {row["system"] for row in rows} == {"host memory", "none", "room for all"}
    assert all(float(row["p50"]) > 0 for row in rows)
    assert "times none" in capsys.readouterr().out
    told = {(row["workload"], row["system"]): json.loads(row["detail"]) for row in rows if row["metric"] == "time"}
    for workload in ("long", "urgent"):  # memory lacked, and what was preempted came back
        with_host, without, room = (told[workload, system] for system in ("host memory", "none", "room for all"))
        assert with_host["preemptions"] >= with_host["swaps_in"] == with_host["swaps_out"] > 0
        assert without["preemptions"] > 0 and without["swaps_out"] == 0 == room["preemptions"]
        assert with_host["computed_again"] < without["computed_again"] and with_host["bytes_copied"] > 0
    before = (tmp_path / "offload.csv").read_text().count("\n")
    offload.main(["--model", str(folder), "--threads", "1", "--out", str(tmp_path), "--workloads", "prefixes", *sizes])
    assert (tmp_path / "offload.csv").read_text().count("\n") == before  # in the place of the older rows


def test_the_first_token_from_disk_beside_a_computed_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(HostOffload, "speed", 1.0)  # however fast this model is, reading is to be measured
    folder = tmp_path / "model"
    tiny_model("llama", vocab_size=320, max_position_embeddings=512).save_pretrained(folder)
    tiny_tokenizer(320).save_pretrained(folder)
    disk.main(["--model", str(folder), "--threads", "1", "--out", str(tmp_path), "--prompt", "320", "--rounds", "1"])
    with (tmp_path / "offload.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["system"], row["metric"]) for row in rows} == {("disk", "first token"), ("none", "first token"), ("disk", "speed-up")}
    assert "320 tokens: " in capsys.readouterr().out
