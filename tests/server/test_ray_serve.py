"""Replicas on a Ray cluster of this machine: two, and one on two ranks; what clients see, and what they see of one that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from server_parts import MODEL, make_model, make_tokenizer, serving

from hf_paged import Engine
from hf_paged.integrations.openai import Settings, create_app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds Ray's processes in /proc"),
]
KEY = {"Authorization": "Bearer secret"}
PATIENCE = 90  # seconds for a new replica


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The addresses, and the process that started Ray."""
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(checkpoint)
    make_tokenizer().save_pretrained(checkpoint)
    command = [sys.executable, str(Path(__file__).with_name("ray_cluster.py")), str(checkpoint)]
    log = (checkpoint / "log").open("w+")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        line = process.stdout.readline()
        assert line.startswith("{"), line + process.stdout.read() + (checkpoint / "log").read_text()[-4000:]
        yield json.loads(line), process.pid
        before = descendants(process.pid)
        process.stdin.close()
        process.wait(timeout=60)
    log.close()
    assert not [pid for pid in before if "ray::" in title(pid)], "Ray's processes have ended"


@pytest.fixture(scope="module")
def base(cluster) -> str:
    return cluster[0]["two"]


@pytest.fixture(scope="module")
def plain():
    with serving(create_app(Engine(make_model(), make_tokenizer()), Settings(model_name=MODEL))) as base:
        yield base


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (task / "children").read_text()
        except OSError:  # the thread has ended meanwhile
            continue
        for child in map(int, children.split()):
            found += [child, *descendants(child)]
    return found


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def processes(cluster, name: str) -> list[int]:
    return sorted(pid for pid in descendants(cluster[1]) if name in title(pid))


def numbers(base: str, name: str, headers=None) -> dict[str, float]:
    """A number of each replica."""
    page = httpx.get(f"{base}/metrics", headers=headers or {}, timeout=30).text
    found = re.findall(rf'^hf_paged:{name}{{.*replica="(\w+)".*}} (\S+)$', page, re.MULTILINE)
    return {replica: float(number) for replica, number in found}


def until(condition, seconds: float = PATIENCE):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.1)
    return found


def ask(base: str, prompt: str, **more) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
    return httpx.post(f"{base}/v1/completions", json=body, headers=KEY, timeout=60)


def test_answers_and_streams_are_the_plain_servers(base, plain):
    clients = [openai.OpenAI(base_url=f"{where}/v1", api_key="secret", max_retries=0) for where in (base, plain)]
    messages = [{"role": "user", "content": "the rain in Spain"}]
    wholes, streams, responses = [], [], []
    for client in clients:
        chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, n=2, temperature=0, logprobs=True)
        wholes.append([choice.model_dump() for choice in chat.choices] + [chat.usage.completion_tokens])
        chunks = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        *parts, usage = chunks
        deltas = [part.choices[0].delta.content or "" for part in parts if part.choices]
        streams.append(("".join(deltas), parts[-1].choices[0].finish_reason, usage.usage.completion_tokens))
        events = client.responses.create(model=MODEL, input="the rain", max_output_tokens=6, temperature=0, stream=True)
        responses.append([(event.type, event.sequence_number) for event in events if event.type != "response.output_text.delta"][:3])
    assert wholes[0] == wholes[1] and streams[0] == streams[1] and responses[0] == responses[1]


def test_errors_keys_and_ids_are_the_plain_servers(base, plain):
    wrong = {"prompt": "x", "max_tokenz": 3}
    told = [httpx.post(f"{where}/v1/completions", json=wrong, headers=KEY) for where in (base, plain)]
    assert told[0].status_code == told[1].status_code == 400 and told[0].json() == told[1].json()
    assert httpx.post(f"{base}/v1/completions", json=wrong).status_code == 401
    assert httpx.get(f"{base}/v1/models", headers={"Authorization": "Bearer other"}).status_code == 401
    named = httpx.post(f"{base}/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=KEY | {"X-Request-Id": "mine-7"})
    assert [value for name, value in named.headers.multi_items() if name.lower() == "x-request-id"] == ["mine-7"]
    assert httpx.get(f"{base}/health").status_code == 200
    assert httpx.get(f"{base}/v1/models", headers=KEY).json()["data"][0]["id"] == MODEL
    late = httpx.post(f"{base}/v1/completions", json={"prompt": "x"}, headers=KEY | {"X-Request-Timeout": "0.000001"})
    assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"


def test_prompts_go_where_their_beginning_is(base):
    for topic in range(6):
        beginning = f"{topic}: " + "all that was said before " * 24
        answers = [ask(base, beginning + f"and question {number}") for number in range(4)]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.headers["x-replica"] for answer in answers}) == 1
        cached = [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
        assert cached[0] == 0 and all(number > 0 for number in cached[1:])
        salted = ask(base, beginning + "and question 0", cache_salt=f"private {topic}")
        assert salted.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_load_spreads_over_both(base):
    """Prompts that begin alike stay together only as long as the other replica has little less to do."""

    async def crowd() -> list[str]:
        async with httpx.AsyncClient(timeout=60) as client:
            body = {"prompt": "one beginning for all " * 20, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
            asked = [client.post(f"{base}/v1/completions", json=body, headers=KEY) for _ in range(24)]
            return [answer.headers["x-replica"] for answer in await asyncio.gather(*asked)]

    answered = asyncio.run(crowd())
    counts = [answered.count(name) for name in set(answered)]
    assert len(counts) == 2 and min(counts) >= 6


def test_responses_are_found_again(base):
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="secret", max_retries=0)
    for number in range(4):
        first = client.responses.create(model=MODEL, input=f"{number} times hello", max_output_tokens=4)
        assert client.responses.retrieve(first.id).output_text == first.output_text
        second = client.responses.create(model=MODEL, input="and on", previous_response_id=first.id, max_output_tokens=4)
        assert [item.type for item in client.responses.input_items.list(second.id).data]
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)
    background = client.responses.create(model=MODEL, input="long", background=True, max_output_tokens=8)
    until(lambda: client.responses.retrieve(background.id).status in ("completed", "incomplete"))
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_gone1234" + "0" * 32)


def test_clients_that_leave_end_their_requests(base):
    body = {"prompt": "go on", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
    before = sum(numbers(base, "request_failure_total", KEY).values())
    with httpx.stream("POST", f"{base}/v1/completions", json=body, headers=KEY) as answer:
        next(answer.iter_lines())
    until(lambda: sum(numbers(base, "request_failure_total", KEY).values()) > before)
    until(lambda: set(numbers(base, "num_requests_running", KEY).values()) == {0.0})
    assert len(numbers(base, "num_requests_running", KEY)) == 2


async def outcome(client: httpx.AsyncClient, base: str, number: int) -> tuple[str, str]:
    """How a request ended, and its text; half of them stream."""
    body = {"prompt": f"{number} under load", "max_tokens": 120, "temperature": 0, "ignore_eos": True}
    if number % 2:
        answer = await client.post(f"{base}/v1/completions", json=body, headers=KEY)
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.json()['error']['code']}", ""
        return "done", answer.json()["choices"][0]["text"]
    text, ends = "", []
    async with client.stream("POST", f"{base}/v1/completions", json=body | {"stream": True}, headers=KEY) as answer:
        if answer.status_code != 200:
            return f"{answer.status_code} {json.loads(await answer.aread())['error']['code']}", ""
        async for line in answer.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                ends.append(f"event {event['error']['code']}")
                continue
            text += event["choices"][0]["text"]
            if event["choices"][0]["finish_reason"]:
                ends.append("done")
    assert len(ends) == 1, f"request {number} ended {len(ends)} times"
    return ends[0], text


def test_a_replica_that_is_killed_under_load(cluster, base, plain):
    replicas = processes(cluster, "ServeReplica:two:Replica")
    assert len(replicas) == 2
    names = set(numbers(base, "num_requests_running", KEY))

    async def under_load() -> list[tuple[str, str]]:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
            asked = [asyncio.create_task(outcome(client, base, number)) for number in range(24)]
            await asyncio.sleep(0.7)
            os.kill(replicas[0], signal.SIGKILL)
            return await asyncio.gather(*asked)

    outcomes = asyncio.run(under_load())
    ends = [end for end, _ in outcomes]
    assert set(ends) <= {"done", "503 replica_lost", "event replica_lost"}, ends
    assert ends.count("done") >= 4 and len(set(ends)) > 1, ends

    async def right() -> list[tuple[str, str]]:
        async with httpx.AsyncClient(timeout=120) as client:
            return await asyncio.gather(*(outcome(client, plain, number) for number in range(24)))

    for (end, text), (_, whole) in zip(outcomes, asyncio.run(right()), strict=True):
        assert text == whole if end == "done" else whole.startswith(text)
    again = until(lambda: len(found := set(numbers(base, "num_requests_running", KEY))) == 2 and found)
    assert len(again & names) == 1
    assert {ask(base, f"{number} after that").status_code for number in range(8)} == {200}


def test_a_replica_on_two_ranks(cluster, plain):
    base = cluster[0]["team"]
    prompts = ["the rain", "a hat and a cat", "x" * 300]
    for prompt in prompts:
        assert ask(base, prompt).json()["choices"] == ask(plain, prompt).json()["choices"]
    replica, rank = processes(cluster, "ServeReplica:team:Replica"), processes(cluster, "ray::_Rank")
    assert len(replica) == len(rank) == 1
    body = {"prompt": "go on", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{base}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(rank[0], signal.SIGKILL)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] in ("closed", "replica_lost")
    until(lambda: not {*replica, *rank} & set(descendants(cluster[1])))
    until(lambda: httpx.get(f"{base}/health", timeout=30).status_code == 200)
    assert ask(base, prompts[0]).json()["choices"] == ask(plain, prompts[0]).json()["choices"]
