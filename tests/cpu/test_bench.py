"""`hf-paged bench` on a tiny model: every part and system, its files, and README's table."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

from hf_paged.benchmarks import schema
from hf_paged.benchmarks.engine import continuous, report, systems, workload
from hf_paged.benchmarks.engine.bench import run_bench
from hf_paged.benchmarks.engine.options import PARTS, SYSTEMS, Options, Scale
from hf_paged.benchmarks.latency import METRICS, Feed, arrivals
from hf_paged.cli.app import app

SMALL = Scale(rounds=1, requests=4, stock_sample=2, load_requests=3, multiples=(1,))
README = Path(schema.HERE).parent / "README.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bench")
    model = tiny_model("llama", vocab_size=320)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tiny_tokenizer(320).save_pretrained(folder)
    return str(folder)


def options(folder: str, out: Path, **more) -> Options:
    return Options(**dict(model=folder, out=out, scale=SMALL, threads=1, levels=(1, 2)) | more)


def detail(row: dict) -> dict:
    return json.loads(row["detail"]) if row["detail"] else {}


def of(rows: list[dict], part: str, metric: str) -> dict[tuple, dict]:
    return {
        (row["workload"], row["system"]): row
        for row in rows
        if (row["benchmark"], row["metric"]) == (f"engine.{part}", metric)
    }


def test_all_parts(folder, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    rows = run_bench(options(folder, tmp_path, workloads=["shared"], readme=readme))
    with (tmp_path / "engine.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    everybody = set(SYSTEMS.values())
    assert {row["benchmark"] for row in rows} == {f"engine.{part}" for part in PARTS}
    assert not [row for row in rows if row["metric"] == "failed"]

    rates = of(rows, "throughput", "output_tokens")
    assert {system for _, system in rates} == everybody
    for (_, system), row in rates.items():
        more = detail(row)
        assert more["requests"] == 4 and more["requests_run"] == {"hf_paged": 8, systems.STOCK_ONE: 2}.get(system, 4)
        if system != systems.STOCK_ONE:
            assert more["compared"] >= 2 and more["different"] == 0

    served = of(rows, "rates", "served")
    at_once = {system for work, system in served if work == "short, all at once"}
    assert at_once == everybody and len({work for work, _ in served}) == 2
    assert {row["metric"] for row in rows if row["benchmark"] == "engine.rates"} == set(METRICS)
    for row in of(rows, "rates", "ttft_p50").values():
        assert (
            0 < float(row["p50"]) and detail(row)["answered"] == detail(row)["requests"] and not detail(row)["failed"]
        )

    levels = {(row["system"], detail(row)["concurrency"]) for row in of(rows, "concurrency", "output_tokens").values()}
    assert levels == {(name, level) for name in everybody for level in (1, 2)} - {(systems.STOCK_ONE, 2)}

    weights, held = of(rows, "memory", "weights"), of(rows, "memory", "kv_peak")
    assert len({row["p50"] for row in weights.values()}) == 1, "the same model"
    for row in held.values():
        over_time = detail(row)
        assert max(over_time["bytes"]) == pytest.approx(float(row["p50"]), rel=1e-4)  # a row keeps six digits
        assert over_time["bytes"][-1] == 0 and over_time["seconds"] == sorted(over_time["seconds"])
    quantized = [float(row["p50"]) for row in of(rows, "quantized", "weights").values()]
    assert len(quantized) == 3 and quantized[2] < quantized[1] == quantized[0]

    for name in ("engine", "engine_rates", "engine_concurrency", "engine_memory"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "engine.md").read_text()
    assert text in capsys.readouterr().out and all(text.count(f"| {name} |") >= 3 for name in everybody)
    shown = readme.read_text()
    assert shown.startswith(f"before\n{report.BEGIN}\n") and shown.endswith(f"\n{report.END}\nafter\n")
    assert report.throughput_table(rows) in shown and "old" not in shown


def test_readme_s_table_is_what_the_rows_give():
    rows = report.newest(schema.HERE / "results" / "engine.csv")
    _, _, rest = README.read_text().partition(report.BEGIN)
    assert rest.partition(report.END)[0].strip() == report.readme(rows)
    assert (schema.HERE / "results" / "engine.md").read_text() == report.markdown(rows)


def test_a_readme_without_markers_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("text")
    with pytest.raises(ValueError, match="no lines <!-- hf-paged bench"):
        report.write_readme(report.newest(schema.HERE / "results" / "engine.csv"), tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "text"


def test_a_later_run_of_one_part_leaves_the_other_parts_tables(folder, tmp_path):
    run_bench(options(folder, tmp_path, parts=["memory"], systems=["one"]))
    first = report.memory_table(report.newest(tmp_path / "engine.csv"))
    run_bench(options(folder, tmp_path, parts=["concurrency"], systems=["one"]))
    rows = report.newest(tmp_path / "engine.csv")
    assert report.memory_table(rows) == first and report.concurrency_table(rows)


def test_stock_s_continuous_batching_that_fails_is_told(folder, tmp_path, monkeypatch, capsys):
    def refuse(model, requests, ignore_eos):
        raise NotImplementedError("no such layers")

    monkeypatch.setattr(continuous, "_manager", refuse)
    rows = run_bench(
        options(folder, tmp_path, parts=["throughput", "rates"], workloads=["shared"], systems=["one", "continuous"])
    )
    (failed,) = [row for row in rows if row["metric"] == "failed"]
    assert failed["system"] == systems.STOCK_CONTINUOUS
    text = (tmp_path / "engine.md").read_text()
    assert "stock, continuous batching was left out (throughput): NotImplementedError: no such layers" in text
    assert of(rows, "rates", "served") and text in capsys.readouterr().out


REQUESTS = [workload.Request(tuple(range(3, 3 + length)), output) for length, output in ((20, 9), (40, 4), (5, 12))]


def expected() -> list[list[int]]:
    return systems.run_stock(tiny_model("llama"), REQUESTS, ignore_eos=True).tokens


FEEDS = {"at once": lambda: None, "rate": lambda: Feed(arrivals(3, 40, seed=0)), "two": lambda: Feed([0.0] * 3, most=2)}


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_stock_s_answers_are_timed(feed, batch):
    feed = FEEDS[feed]()
    run = systems.run_stock(tiny_model("llama"), REQUESTS, batch=batch, ignore_eos=True, feed=feed)
    check(run, feed)
    assert run.kv_bytes == max(size for _, size in run.kv) > 0


@pytest.mark.parametrize("feed", FEEDS)
def test_stock_s_continuous_batching_has_stock_s_tokens(feed):
    model, feed = tiny_model("llama"), FEEDS[feed]()
    run = continuous.run_continuous(model, REQUESTS, ignore_eos=True, feed=feed)
    check(run, feed or Feed([]))
    assert model.config._attn_implementation == "sdpa", "as it was"


def check(run: systems.Run, feed: Feed | None) -> None:
    assert run.tokens == expected()
    if feed is not None:
        for answer, request in zip(run.answers, REQUESTS, strict=True):
            assert answer.num_tokens == len(answer.times) == request.max_new_tokens
            assert answer.times == sorted(answer.times) and 0 < answer.times[0] and answer.seconds <= run.seconds


def test_a_feed_hands_out_what_is_due_and_no_more_than_may_be_under_way():
    feed = Feed([0.0, 0.0, 0.0, 0.02], most=2)
    feed.start()
    assert feed.take() == [0, 1] and feed.take() == [] and math.isinf(feed.next_in)
    feed.done(1)
    assert feed.take(limit=1) == [2]
    feed.done(0)
    assert feed.take() == [3] and feed.exhausted and feed.now >= 0.02


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["--workload", "nothing"],
            "workloads has no 'nothing'; there are mixed, shared, chat, long, short, and paths",
        ),
        (["--load-workload", "nothing"], "workloads has no 'nothing'"),
        (["--system", "nothing"], "systems has no 'nothing'"),
        (["--system", "none"], "no peers"),
        (["--parts", "throughput,nothing"], "parts has no 'nothing'; there are throughput, rates"),
        (["--system", "one", "--profile", "x.json"], "profile is of the system paged"),
        (["--rate", "0"], "rates must be above 0"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--peer", "http://a/v1"], "a peer must be NAME=URL"),
        (["--peer", "a=http://b/v1", "--peer", "a=http://c/v1"], "every peer needs a name of its own"),
        (["--peer", "hf_paged=http://b/v1"], "'hf_paged' is a system of this process"),
        (["--peer", "a=http://127.0.0.1:9/v1"], "does not list a model"),
        (["--api-key-env", "HF_PAGED_NO_SUCH"], "HF_PAGED_NO_SUCH is not set"),
    ],
)
def test_mistakes_are_named(given, words, folder, tmp_path):
    done = CliRunner().invoke(app, ["bench", folder, "--out", str(tmp_path), *given])
    assert done.exit_code and words in str(done.exception)
