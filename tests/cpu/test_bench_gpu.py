"""The GPU benchmarks: their arithmetic, and a dry run of all of them on the CPU."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_paged.benchmarks import schema
from hf_paged.benchmarks.gpu import __main__ as everything
from hf_paged.benchmarks.gpu import engine, kernels, models, stock, workload
from hf_paged.benchmarks.gpu.profile import summarize
from hf_paged.benchmarks.gpu.report import Clock, Report, Target
from hf_paged.benchmarks.gpu.timing import COLD_BYTES, measure, num_sets

CPU = torch.device("cpu")


def rows_of(folder) -> list[dict]:
    with (folder / "tiny.csv").open() as file:
        return list(csv.DictReader(file))


def dry_run(main, tmp_path, *options: str) -> list[dict]:
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path), *options]) == 0
    return rows_of(tmp_path)


def test_every_part_runs_in_one_command(tmp_path, capsys):
    rows = dry_run(everything.main, tmp_path, "--models", "qwen3-0.6b")
    assert tuple(rows[0]) == schema.COLUMNS and rows[0]["benchmark"] == "copy"
    measured = {(row["benchmark"], row["system"]) for row in rows}
    for benchmark in ("decode attention", "prefill attention", "rms_norm", "silu and mul", "linear down"):
        assert (benchmark, "hf_paged") in measured
    assert {("linear o", "torch linear"), ("prefill attention", "torch SDPA")} <= measured
    quantized = {row["dtype"] for row in rows if row["benchmark"] == "quantized down" and row["metric"] == "speed-up"}
    assert quantized == set(kernels.kernels_quantized.SCHEMES) and ("quantized experts", "hf_paged") in measured
    tokens = [row for row in rows if row["metric"] == "output tokens" and row["workload"] == "nano-vllm"]
    assert {row["system"] for row in tokens} == {engine.PAGED, engine.ONE, engine.BATCH, engine.CONTINUOUS}
    speedups = {row["baseline"]: row for row in rows if row["metric"] == "speed-up" and row["benchmark"] == "engine"}
    assert set(speedups) == {engine.ONE, engine.BATCH, engine.CONTINUOUS, engine.PAGED}
    assert all(row["samples"] == "2" for name, row in speedups.items() if name != engine.PAGED)  # before and after stock's
    steps = [row for row in rows if row["metric"] == "step by its floor"]
    assert [(row["system"], row["workload"]) for row in steps] == [
        *((engine.PAGED, f"decode of {batch}") for batch in (1, 3)),
        *((system, "decode of 1") for system in engine.QUANTIZED.values()),
    ]
    memory = {row["system"]: float(row["p50"]) for row in rows if row["metric"] == "memory"}
    assert memory["hf_paged, int4"] < memory["hf_paged, fp8"]
    assert "MISSED" not in capsys.readouterr().out  # a dry run's figures are held against nothing


def test_what_does_not_fit_into_the_time_is_named(tmp_path, capsys):
    rows = dry_run(kernels.main, tmp_path, "--minutes", "0")
    assert [row["benchmark"] for row in rows] == ["copy"]
    assert "not measured: decode attention from tiny-llama 1 x 32 on: out of time" in capsys.readouterr().out


def test_a_part_that_fails_does_not_take_the_others_along(tmp_path, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(kernels.kernels_layers.fused, "act_and_mul", broken)
    assert kernels.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 1
    assert "not measured: silu and mul tiny-llama 8: RuntimeError: out of registers" in capsys.readouterr().out
    assert "rms_norm" in {row["benchmark"] for row in rows_of(tmp_path)}


def test_floors_are_those_of_the_published_sizes():
    llama, qwen = models.SHAPES["llama-8b"], models.SHAPES["qwen3-0.6b"]
    assert (llama.weight_bytes() / 1e9, llama.kv_bytes_per_token()) == (pytest.approx(15.01, abs=0.01), 131072)
    assert (qwen.weight_bytes() / 1e9, qwen.kv_bytes_per_token()) == (pytest.approx(1.19, abs=0.01), 114688)


@pytest.mark.parametrize("shape", models.TINY.values(), ids=lambda shape: shape.name)
def test_the_weights_counted_are_the_model_s(shape):
    model = models.random_model(shape.config(), CPU, torch.float32)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    head = model.lm_head.weight.numel() if shape.tied else 0  # of one matrix under two names the embedding's is listed
    assert shape.weight_bytes(1) == matrices + head
    assert model.generation_config.eos_token_id is None


def test_the_workload_is_nano_vllm_s():
    work = workload.nano_vllm()
    assert (len(work.requests), work.prompt_tokens, work.output_tokens) == (256, 142827, 133966)
    assert max(max(request.prompt) for request in work.requests) <= 10000
    warm_up = workload.dwindling(50, count=6).requests
    assert [request.max_new_tokens for request in warm_up] == [2, 2, 3, 3, 4, 4]


def test_stock_s_time_for_steps_that_were_not_run_is_that_of_more_mean_steps(monkeypatch):
    monkeypatch.setattr(stock, "_generate", lambda model, group, count: 1.0 + 0.5 * count)
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    requests = workload.uniform(50, count=2, prompt=5, output=100).requests
    run = stock.run_generate(model, [requests], max_steps=10)
    assert run.extrapolated and run.steps_run == 10
    assert run.seconds == pytest.approx(51.0) and run.rate == pytest.approx(200 / 51)
    whole = stock.run_generate(model, [requests], max_steps=100)
    assert not whole.extrapolated and whole.seconds == pytest.approx(51.0)


def test_kernels_of_a_step_are_told_by_how_often_they_run():
    events = [("attention", 2e-6)] * 8 + [("linear", 1e-6)] * 32 + [("head", 5e-6)] * 2 + [("once", 1e-6)]
    profile = summarize(events, steps=2, num_layers=4)
    assert profile.names == {"attention": 1, "linear": 4} and profile.per_layer == 5
    assert profile.elsewhere == 1.5
    assert profile.busy_seconds == pytest.approx((16 + 32 + 10 + 1) * 1e-6 / 2)


def test_targets_have_a_direction():
    assert Target(0.85).met(0.9) and not Target(0.85).met(0.8)
    assert Target(1.25, at_most=True).met(1.2) and not Target(1.25, at_most=True).met(1.3)


def test_reports_say_what_missed_its_target(tmp_path, capsys):
    report = Report(tmp_path / "gpu.csv", CPU)
    report.add("decode attention", "8 x 4096", "hf_paged", "share", "", [0.8, 0.9, 0.7], target=Target(0.85))
    report.add("decode attention", "1 x 1024", "hf_paged", "share", "", [0.5])
    assert report.close() == 0
    printed = capsys.readouterr().out
    assert "MISSED: at least 0.85" in printed and "0 of 1 targets met" in printed
    with (tmp_path / "gpu.csv").open() as file:
        assert '"met": false' in next(csv.DictReader(file))["detail"]


def test_a_part_of_the_time_is_never_more_than_what_is_left():
    clock = Clock(10)
    assert clock.part(100).left <= 10 and clock.part(1).left <= 1


def test_inputs_are_many_enough_to_be_cold():
    assert num_sets(COLD_BYTES * 2) == 1 and num_sets(COLD_BYTES / 4 + 1) == 4 and num_sets(1) == 32


def test_candidates_take_turns_over_their_input_sets():
    calls = []
    timings = measure({"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))}, 2, CPU, rounds=2)
    assert calls == [("a", 0), ("b", 0), *[("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 2]
    assert len(timings["a"].samples) == 2 and not timings["a"].graphed


def test_it_runs_from_a_checkout_that_is_not_installed(tmp_path):
    """As on a machine that has torch, triton and transformers and nothing else; -S: without the links that pip made."""
    site = Path(torch.__file__).parents[1]
    script = Path(__file__).parents[2] / "benchmarks" / "run.py"
    options = ["gpu.check", "--device", "cpu", "--small", "--backend", "reference", "--only", "activations"]
    code = f"import runpy, sys; sys.path.append({str(site)!r}); sys.argv = {[str(script), *options]!r}; "
    code += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all 1 areas passed\n")


def test_a_peer_that_does_other_work_is_found(tmp_path, monkeypatch, capsys):
    exact = kernels.kernels_attention.peers.decode

    def wrong(*arguments):
        return {name: lambda i: run(i) * 1.2 for name, run in exact(*arguments).items()}  # noqa: B023

    monkeypatch.setattr(kernels.kernels_attention.peers, "decode", wrong)
    assert kernels.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 1
    assert "AssertionError: hf_paged and torch SDPA differ by" in capsys.readouterr().out
