"""The benchmark of quantized weights and caches: a short run of it, each system in a process of its own."""

from __future__ import annotations

import csv
import math

import pytest
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged.benchmarks import schema
from hf_paged.benchmarks.engine import workload
from hf_paged.benchmarks.quant import engine, kernels
from hf_paged_kernels.cpu import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=320, max_position_embeddings=1024).save_pretrained(path)
    tiny_tokenizer(320).save_pretrained(path)
    return path


def test_systems_are_measured_side_by_side(folder, tmp_path, capsys):
    options = ["--short", "--threads", "1", "--model", str(folder), "--out", str(tmp_path)]
    engine.main(["--systems", "fp32,KV int8", *options])
    with (tmp_path / "quant.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == schema.COLUMNS
    values = {(row["system"], row["workload"], row["metric"]): float(row["p50"]) for row in rows}
    names = {(workload, metric) for _, workload, metric in values}
    for workload_name in (*engine.SHORT.decodes, "mixed"):
        assert {(workload_name, "output_tokens"), (workload_name, "speed-up")} <= names
    assert {row["system"] for row in rows if row["baseline"]} == {"KV int8"}
    for metric in ("weights", "kv_per_token", "kv_peak", "memory_peak", "memory_own"):
        assert values["fp32", "all", metric] > 0
    assert values["KV int8", "all", "kv_per_token"] < 0.5 * values["fp32", "all", "kv_per_token"]
    assert values["KV int8", "all", "weights"] == values["fp32", "all", "weights"]
    exact, rounded = (values[name, "text", "perplexity"] for name in ("fp32", "KV int8"))
    assert exact != rounded and abs(math.log(exact / rounded)) < 0.5
    assert 0 < values["KV int8", "text", "logprob_difference"] < 0.5
    assert 0.5 < values["KV int8", "text", "same_best_token"] <= 1
    assert "perplexity" in capsys.readouterr().out


def test_a_system_that_fails_is_named(tmp_path, capfd):
    with pytest.raises(RuntimeError, match="fp32: the process ended with status 1"):
        engine.main(["--systems", "fp32", "--short", "--model", str(tmp_path / "nothing"), "--out", str(tmp_path)])
    assert "nothing" in capfd.readouterr().err


def test_an_unknown_system_is_refused(capsys):
    with pytest.raises(SystemExit):
        engine.main(["--systems", "fp32,int1"])
    assert "--systems has no 'int1'; there are fp32, bf16, int8" in capsys.readouterr().err


def test_windows_lie_evenly_over_the_text():
    windows = workload.windows(tiny_tokenizer(320), 3, 50)
    assert [len(window) for window in windows] == [50] * 3 and len(set(map(tuple, windows))) == 3


@pytest.mark.skipif(not build.available(), reason=str(build.why_unavailable()))
def test_layers_alone_are_measured_side_by_side(tmp_path):
    kernels.main(["--short", "--threads", "1", "--rows", "1,3", "--out", str(tmp_path)])
    with (tmp_path / "quant_kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == schema.COLUMNS
    ratios = {(row["workload"], row["system"]) for row in rows if row["metric"] == "speed-up"}
    systems = {*kernels.KINDS, "torch int4pack", "torch int8pack"}
    assert ratios == {(f"{N}x{K}, {M} rows", system) for N, K in kernels.SMALL for M in (1, 3) for system in systems}
    assert all(float(row["p50"]) > 0 for row in rows)
