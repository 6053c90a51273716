"""Chrome traces of an engine's steps, by themselves and from `hf-paged bench`."""

from __future__ import annotations

import csv
import json

import pytest
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from hf_paged import Engine, InvalidArgument, SamplingParams
from hf_paged.benchmarks.engine.bench import run_bench
from hf_paged.benchmarks.engine.options import Options

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def events(path) -> list[dict]:
    return json.loads(path.read_text())["traceEvents"]


def test_every_phase_lies_in_its_step(tmp_path):
    path = tmp_path / "trace.json"
    with Engine(tiny_model("llama")) as engine:
        engine.generate([[5, 6, 7]], GREEDY)
        with engine.trace(path):
            engine.generate([[5, 6, 7], [8, 9]], GREEDY)
        engine.generate([[5, 6, 7]], GREEDY)
    spans = [event for event in events(path) if event["ph"] == "X"]
    steps = [span for span in spans if span["name"] == "step"]
    assert len(steps) == 5
    assert {"schedule", "build", "model", "sample", "detokenize"} <= {span["name"] for span in spans}
    ends = [(span["ts"], span["ts"] + span["dur"]) for span in steps]
    assert all(before[1] <= after[0] for before, after in zip(ends, ends[1:]))
    for span in spans:
        assert any(begin <= span["ts"] and span["ts"] + span["dur"] <= end for begin, end in ends), span
    running = [event["args"]["running"] for event in events(path) if event["name"] == "requests"]
    held = [event["args"]["bytes"] for event in events(path) if event["name"] == "KV cache"]
    assert running == [2, 2, 2, 2, 0] and held[0] > 0 and held[-1] == 0


def test_one_trace_at_a_time_and_only_where_it_can_be_written(tmp_path):
    with Engine(tiny_model("llama")) as engine:
        with pytest.raises(FileNotFoundError):
            with engine.trace(tmp_path / "nowhere" / "trace.json"):
                pass
        with engine.trace(tmp_path / "trace.json"):
            with pytest.raises(InvalidArgument, match="trace: one is being written"):
                with engine.trace(tmp_path / "other.json"):
                    pass
        with pytest.raises(RuntimeError, match="mine"):
            with engine.trace(tmp_path / "trace.json"):
                engine.generate([[5, 6]], GREEDY)
                raise RuntimeError("mine")
    assert events(tmp_path / "trace.json"), "what there was until the error is written"


def test_bench_runs_traces_of_requests_and_shows_the_steps(tmp_path, capsys):
    model = tiny_model("llama", vocab_size=320)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(320).save_pretrained(tmp_path / "model")
    trace = tmp_path / "mine.jsonl"
    trace.write_text('{"prompt": [5, 6, 7], "output_tokens": 4}\n{"prompt_tokens": 9, "output_tokens": 3}\n')
    options = dict(model=str(tmp_path / "model"), workloads=[str(trace)], systems=["paged", "one"], rounds=1, threads=1)
    options |= dict(parts=["throughput"], requests=2, stock_sample=2, profile=tmp_path / "steps.json")
    rows = run_bench(Options(**options, out=tmp_path / "out"))
    (row,) = [row for row in rows if (row["system"], row["metric"]) == ("hf_paged", "output_tokens")]
    detail = json.loads(row["detail"])
    assert (detail["compared"], detail["different"]) == (4, 0)
    assert [detail[name] for name in ("requests", "prompt_tokens", "output_tokens")] == [2, 12, 7]
    with (tmp_path / "out" / "engine.csv").open() as file:
        assert "mine" in {row["workload"] for row in csv.DictReader(file)}
    assert [event for event in events(tmp_path / "steps.json") if event["name"] == "step"]
    assert "| mine: 2 requests | stock, one at a time |" in capsys.readouterr().out
