"""Servers side by side under load: against the app itself, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import csv
import json
import math

import pytest
from server_parts import MODEL, make_tokenizer, serving
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner

from hf_paged.benchmarks import schema
from hf_paged.benchmarks.engine.workload import Request
from hf_paged.benchmarks.latency import METRICS, Answer, arrivals, outcome
from hf_paged.benchmarks.peers.load import Peer, load
from hf_paged.cli.app import app


def answers(peer: Peer, requests: list[Request], most: int | None = None) -> list[Answer]:
    return asyncio.run(load(peer, MODEL, requests, [0.0] * len(requests), headers={}, most=most))


def test_a_server_s_answers_are_timed_and_counted(url):
    requests = [Request((5, 6, 7), 9), Request((8, 9), 4)]
    found = answers(Peer("us", f"{url}/v1"), requests)
    for answer, one in zip(found, requests):
        assert answer.problem is None and answer.num_tokens == one.max_new_tokens
        assert 0 < answer.times[0] <= answer.times[-1] <= answer.seconds
        assert sorted(answer.times) == answer.times and len(answer.times) <= one.max_new_tokens
    result = outcome("us", math.inf, found)
    assert result.answered == 2 and result.values.keys() == METRICS.keys() and all(v > 0 for v in result.values.values())


def test_servers_alone_leave_rows_a_table_and_charts(url, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    trace = tmp_path / "mine.jsonl"
    trace.write_text("\n".join(json.dumps({"prompt_tokens": 5 + k, "output_tokens": 3}) for k in range(4)))
    arguments = ["bench", str(tmp_path / "tokenizer"), "--system", "none", "--peer", f"one={url}/v1", "--peer", f"two={url}/v1/"]
    arguments += ["--rate", "40", "--load-workload", str(trace), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.exception
    with (tmp_path / "engine.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == schema.COLUMNS
    loads = [row for row in rows if row["benchmark"] == "engine.rates"]
    assert {(row["system"], row["metric"]) for row in loads} == {(name, metric) for name in ("one", "two") for metric in METRICS}
    assert {row["workload"] for row in loads} == {"mine, all at once", "mine, 40 a second"}
    levels = [json.loads(row["detail"]) for row in rows if row["benchmark"] == "engine.concurrency"]
    assert {detail["concurrency"] for detail in levels} == {1, 2, 4}
    assert "mine has too few requests for 8 under way" in done.stderr
    assert all(json.loads(row["detail"])["answered"] == json.loads(row["detail"])["requests"] for row in rows)
    text = (tmp_path / "engine.md").read_text()
    assert "| one |" in text and text in done.stdout
    assert all((tmp_path / f"engine_{part}.png").is_file() for part in ("rates", "concurrency"))


def test_no_more_requests_are_under_way_than_may_be():
    under_way, most = 0, 0

    async def complete(request):
        async def stream():
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.02)
            yield WORD
            under_way -= 1
            yield b"data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    with serving(Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])) as url:
        found = answers(Peer("other", f"{url}/v1"), [Request((1,), 2)] * 7, most=2)
    assert most == 2 and all(answer.problem is None for answer in found)


def test_a_server_that_stops_answering_is_left_out(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)

    async def models(request):
        return JSONResponse({"data": [{"id": "m"}]})

    async def fail(request):
        return JSONResponse({"error": {"message": "out of memory"}}, status_code=500)

    routes = [Route("/v1/models", models), Route("/v1/completions", fail, methods=["POST"])]
    with serving(Starlette(routes=routes)) as url:
        arguments = ["bench", str(tmp_path), "--system", "none", "--peer", f"weak={url}/v1", "--out", str(tmp_path)]
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.exception
    assert "weak was left out (rates): weak answered no request: status 500" in (tmp_path / "engine.md").read_text()


def event(**chunk) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


WORD = event(choices=[{"text": "a"}])
STREAMS = {
    "cut": (WORD, "the stream ended too early"),
    "error": (WORD + event(error={"message": "no more"}), "no more"),
    "no json": (b"data: {\n\n", "JSONDecodeError"),
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_stream_that_breaks_is_told_and_not_counted(case):
    body, words = STREAMS[case]

    async def complete(request):
        if 1 in (await request.json())["prompt"]:
            return StreamingResponse(iter([body]), media_type="text/event-stream")
        return StreamingResponse(iter([WORD, WORD, b"data: [DONE]\n\n"]), media_type="text/event-stream")

    with serving(Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])) as url:
        bad, good = answers(Peer("other", f"{url}/v1"), [Request((1,), 2), Request((2,), 2)])
    assert words in bad.problem and good.problem is None
    assert good.num_tokens == 2, "without usage, events are counted"
    result = outcome("other", 1.0, [bad, good])
    assert result.answered == 1 and result.problems == [bad.problem]
    with pytest.raises(RuntimeError, match="other answered no request"):
        outcome("other", 1.0, [bad])


def test_a_server_that_refuses_or_is_not_there():
    async def refuse(request):
        return JSONResponse({"error": {"message": "ignore_eos is unknown"}}, status_code=400)

    routes = [Route("/v1/completions", refuse, methods=["POST"]), Route("/v1/models", lambda request: PlainTextResponse("x"))]
    with serving(Starlette(routes=routes)) as url:
        (answer,) = answers(Peer("strict", f"{url}/v1"), [Request((1,), 2)])
        with pytest.raises(ConnectionError, match="strict: .*/v1/models does not list a model"):
            Peer("strict", f"{url}/v1").model({})
    assert answer.problem.startswith("status 400: ") and "ignore_eos" in answer.problem
    (answer,) = answers(Peer("gone", f"{url}/v1"), [Request((1,), 2)])
    assert "ConnectError" in answer.problem


def test_requests_come_at_the_rate():
    times = arrivals(4000, 8.0, seed=1)
    assert times == sorted(times) == arrivals(4000, 8.0, seed=1) and times[0] == 0
    assert 4000 / times[-1] == pytest.approx(8.0, rel=0.05)
    assert set(arrivals(5, math.inf, seed=1)) == {0.0}


@pytest.mark.parametrize("text", ["http://a/v1", "=http://a", "vllm=", "vllm=ftp://a", ""])
def test_a_peer_is_a_name_and_an_address(text):
    with pytest.raises(ValueError, match="NAME=URL"):
        Peer.parse(text)
