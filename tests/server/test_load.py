"""Many clients: who leaves while he waits, how late the event loop is, and the benchmark that measures both."""

from __future__ import annotations

import asyncio
import csv
import http.client
import json
import time
from collections import Counter

import httpx
import pytest
from server_parts import MODEL, make_model, make_tokenizer, serving
from tiny_models import tiny_model

from hf_paged import Engine, EngineConfig
from hf_paged.benchmarks import schema
from hf_paged.benchmarks.server import __main__ as bench
from hf_paged.benchmarks.server.process import Reading
from hf_paged.integrations.openai import Settings, create_app
from hf_paged.integrations.openai.lag import INTERVAL, watched_loop
from hf_paged.integrations.openai.turns import MOST, TakeTurns


@pytest.fixture(scope="module")
def narrow():
    """A server that runs one sequence at a time, and its engine."""
    model = tiny_model("llama", vocab_size=320, max_position_embeddings=32768)
    engine = Engine(model, make_tokenizer(), EngineConfig(max_num_seqs=1))
    with serving(create_app(engine, Settings(model_name=MODEL))) as url:
        yield url, engine


ASKS = {
    "/v1/completions": {"prompt": "Tell me", "max_tokens": 30000},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Tell me"}], "max_tokens": 30000},
    "/v1/responses": {"input": "Tell me", "max_output_tokens": 30000},
}


@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_while_he_waits_for_his_turn_waits_no_more(narrow, stream, path):
    url, engine = narrow

    def until(running: int, waiting: int) -> None:
        end = time.monotonic() + 60
        while (engine.stats()["running"], engine.stats()["waiting"]) != (running, waiting):
            assert time.monotonic() < end
            time.sleep(0.01)

    endless = {"model": MODEL, "ignore_eos": True, **ASKS["/v1/completions"]}
    asked = {"model": MODEL, "ignore_eos": True, "stream": stream, **ASKS[path]}
    with httpx.stream("POST", f"{url}/v1/completions", json=endless | {"stream": True}, timeout=60) as answer:
        events = answer.iter_lines()
        next(events)
        second = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        second.request("POST", path, json.dumps(asked), {"Content-Type": "application/json"})
        until(running=1, waiting=1)
        second.close()
        until(running=1, waiting=0)
        next(events)  # the first goes on
    until(running=0, waiting=0)


def test_requests_that_come_at_once_begin_a_few_at_a_time_and_in_order():
    begun: list[tuple[int, int]] = []  # (turn of the loop, request)
    turn = 0

    async def app(scope, receive, send):
        begun.append((turn, scope["number"]))

    async def main():
        nonlocal turn
        layer = TakeTurns(app)
        for round_number in range(2):  # afterwards it is as it was
            crowd = [
                asyncio.ensure_future(layer({"type": "http", "number": 100 * round_number + number}, None, None))
                for number in range(50)
            ]
            crowd[30].cancel()
            while not all(one.done() for one in crowd):
                turn += 1
                await asyncio.sleep(0)

    asyncio.run(main())
    wanted = [number for number in range(50) if number != 30]
    assert [number for _, number in begun] == [*wanted, *(100 + number for number in wanted)]
    assert max(Counter(turn for turn, _ in begun).values()) == MOST


def test_every_moment_of_a_delay_counts_as_lag():
    seen: list[float] = []

    async def main():
        async with watched_loop(seen.append):
            await asyncio.sleep(INTERVAL / 2)
            time.sleep(6 * INTERVAL)  # whatever blocks the loop
            await asyncio.sleep(0)
            await asyncio.sleep(INTERVAL / 2)
        count = len(seen)
        await asyncio.sleep(2 * INTERVAL)
        assert len(seen) == count  # nobody looks any more

    asyncio.run(main())
    assert len(seen) >= 5 and max(seen) >= 5 * INTERVAL
    late = sorted(seen)[-5:]
    assert all(b - a == pytest.approx(INTERVAL) for a, b in zip(late, late[1:]))


def test_the_lag_is_told(url):
    def looks() -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith("hf_paged:event_loop_lag_seconds_count"))

    before = looks()
    while looks() == before:
        time.sleep(INTERVAL)


def test_percentiles_of_lag_lie_in_its_buckets():
    before = Reading(0.0, {0.01: 5.0, 0.05: 5.0, float("inf"): 6.0})
    after = Reading(1.0, {0.01: 95.0, 0.05: 105.0, float("inf"): 106.0})  # 90 up to 10 ms, 10 more up to 50 ms
    assert after.lag_since(before, 0.9) == pytest.approx(0.01)
    assert after.lag_since(before, 0.95) == pytest.approx(0.03)
    assert Reading(0.0, {0.01: 1.0, float("inf"): 5.0}).lag_since(Reading(0.0), 0.99) == 0.01  # "more than"


@pytest.mark.slow
def test_the_benchmark_measures_a_real_server(tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    options = ["--clients", "12", "--max-tokens", "4", "--streams", "3", "--visitors", "1", "--arrivals", "4", "--threads", "1"]
    options += ["--long", "40"]
    assert bench.main(["--model", str(tmp_path / "model"), "--out", str(tmp_path), *options]) == 0
    with (tmp_path / "server.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == schema.COLUMNS
    values = {(row["workload"], row["system"], row["metric"]): float(row["p50"]) for row in rows}
    assert values["12 clients", "http", "lost"] == values["12 clients", "http", "wrong"] == 0
    rates = [values["12 clients", system, "output_tokens"] for system in ("http", "engine")]
    assert all(rate > 0 for rate in rates) and values["12 clients", "http", "share"] > 0
    assert values["newcomer, 3 streams", "http", "first_token"] > 0
    assert values["3 streams, long prompt", "http", "between_tokens"] > 0
    assert "share of the engine's own" in (tmp_path / "server.md").read_text() and "0 lost, 0 wrong" in capsys.readouterr().out
