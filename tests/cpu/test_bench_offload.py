"""The benchmark of host memory behind the cache: a short run of it."""

from __future__ import annotations

import csv
import json

from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged.benchmarks import schema
from hf_paged.benchmarks.engine import offload


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
