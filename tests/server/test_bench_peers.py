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

from hf_paged.benchmarks import schema
from hf_paged.benchmarks.engine.workload import Request
from hf_paged.benchmarks.peers import __main__ as peers
from hf_paged.benchmarks.peers.load import Answer, Peer, arrivals, load
from hf_paged.benchmarks.peers.report import METRICS, outcome


def answers(peer: Peer, requests: list[Request], rate: float = math.inf) -> list[Answer]:
    return asyncio.run(load(peer, MODEL, requests, rate, headers={}, seed=0))


def test_a_server_s_answers_are_timed_and_counted(url):
    requests = [Request((5, 6, 7), 9), Request((8, 9), 4)]
    found = answers(Peer("us", f"{url}/v1"), requests)
    for answer, one in zip(found, requests):
        assert answer.problem is None and answer.num_tokens == one.max_new_tokens
        assert 0 < answer.times[0] <= answer.times[-1] <= answer.seconds
        assert sorted(answer.times) == answer.times and len(answer.times) <= one.max_new_tokens
    result = outcome("us", math.inf, found)
    assert result.answered == 2 and result.values.keys() == METRICS.keys() and all(v > 0 for v in result.values.values())


def test_the_whole_run_leaves_rows_a_table_and_a_chart(url, tmp_path, capsys):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    trace = tmp_path / "mine.jsonl"
    trace.write_text("\n".join(json.dumps({"prompt_tokens": 5 + k, "output_tokens": 3}) for k in range(4)))
    arguments = ["--peer", f"one={url}/v1", "--peer", f"two={url}/v1/", "--rate", "200", "--rate", "inf"]
    arguments += ["--workload", str(trace), "--requests", "3", "--model", str(tmp_path / "tokenizer"), "--out", str(tmp_path)]
    peers.main(arguments)
    with (tmp_path / "peers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == schema.COLUMNS
    assert {(row["system"], row["metric"]) for row in rows} == {(name, metric) for name in ("one", "two") for metric in METRICS}
    assert {row["workload"] for row in rows} == {"3 requests, mine, 200 a second", "3 requests, mine, all at once"}
    assert all(json.loads(row["detail"])["answered"] == 3 for row in rows)
    text = (tmp_path / "peers.md").read_text()
    assert text.count("| one |") == text.count("| two |") == 2 and text in capsys.readouterr().out
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


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
def test_a_peer_is_a_name_and_an_address(text, capsys):
    with pytest.raises(ValueError, match="NAME=URL"):
        Peer.parse(text)
    with pytest.raises(SystemExit):
        peers.main(["--peer", text])
    assert "--peer" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--rate", "0"], ["--rate", "-1"], ["--rate", "nan"], ["--workload", "nothing"]])
def test_options_are_named(option, capsys):
    with pytest.raises(SystemExit):
        peers.main(["--peer", "a=http://b/v1", *option])
    assert option[0] in capsys.readouterr().err
