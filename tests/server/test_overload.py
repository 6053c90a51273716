"""Full queues, and clients that leave. The engine takes its steps one by one, as the tests let it."""

from __future__ import annotations

import http.client
import json
import threading
import time

import httpx
import openai
import pytest
from server_parts import MODEL, make_model, make_tokenizer, serving

from hf_paged import Engine, EngineConfig
from hf_paged.integrations.openai import Settings, create_app


class Gated:
    """A server whose engine waits before every step until it is told to go on."""

    def __init__(self, engine: Engine, app):
        self.engine, self.app, self.url = engine, app, ""
        self.steps = 0
        self._go = threading.Semaphore(0)
        self._free = self._waiting = False
        step = engine.step

        def gated():
            if not self._free:
                self._waiting = True
                self._go.acquire()
                self._waiting = False
            self.steps += 1
            return step()

        engine.step = gated

    def go(self, steps: int) -> None:
        """Let it take so many steps, and wait until it has, and waits again or has nothing to do."""
        wanted = self.steps + steps
        self._go.release(steps)
        self.until(lambda: self.steps == wanted and (self._waiting or not self.engine.has_unfinished()))

    def free(self) -> None:
        self._free = True
        self._go.release()

    def until(self, condition) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)

    def arrived(self) -> None:
        """A request has come, and waits for the end of the step to be taken."""
        self.until(lambda: self.app.state.service.engine._arrivals)

    def number(self, name: str, **labels) -> float:
        registry = self.app.state.service.metrics.registry
        return registry.get_sample_value(f"hf_paged:{name}", {"model_name": MODEL, **labels}) or 0


@pytest.fixture
def gated():
    engine = Engine(make_model(), make_tokenizer(), EngineConfig(max_num_seqs=4, max_queue=4))
    app = create_app(engine, Settings(model_name=MODEL))
    gated = Gated(engine, app)
    with serving(app) as gated.url:
        yield gated
        gated.free()
        gated.until(lambda: not engine.has_unfinished())
        assert engine.stats()["kv_bytes_in_use"] == 0
        engine.check_integrity()


def posted(url: str, path: str, **body) -> http.client.HTTPConnection:
    """A request under way."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection


CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
SEVERAL = ("/v1/completions", {"prompt": ["a", "b", "c"]})


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path, body, prompts", [(*CHAT, 1), (*SEVERAL, 3)], ids=["chat", "several"])
@pytest.mark.parametrize("steps", [0, 3], ids=["in the queue", "on the way"])
def test_a_client_that_leaves_costs_no_further_step(gated, path, body, prompts, stream, steps):
    connection = posted(gated.url, path, **body, stream=stream, max_tokens=300, ignore_eos=True, n=2 if prompts == 1 else 1)
    gated.until(lambda: gated.number("num_requests_waiting") == prompts)
    if steps:
        gated.go(steps)
    if steps and stream:
        assert connection.getresponse().readline().startswith(b"data: ")
    connection.close()
    left = {"code": "client_closed_request"}
    gated.until(lambda: gated.number("request_failure_total", **left) == prompts)
    tokens = gated.engine.stats()["output_tokens"]
    gated.go(1)
    assert not gated.engine.has_unfinished()
    assert gated.engine.stats()["output_tokens"] == tokens
    gated.until(lambda: gated.number("errors_total", **left) == 1)
    status = "200" if stream and steps else "499"
    assert gated.number("http_requests_total", method="POST", handler=path, status=status) == 1


def fill(gated, count: int) -> list[http.client.HTTPConnection]:
    """Every seat taken, and `count` prompts waiting. Arrivals are taken between steps."""
    running = posted(gated.url, "/v1/completions", prompt="a", n=4, max_tokens=100, ignore_eos=True)
    gated.until(lambda: gated.number("num_requests_waiting") == 1)
    gated.go(2)
    assert gated.number("num_requests_running") == 4
    waiting = posted(gated.url, "/v1/completions", prompt=["a"] * count, max_tokens=2, ignore_eos=True)
    gated.arrived()
    gated.go(1)
    gated.until(lambda: gated.number("num_requests_waiting") == count)
    return [running, waiting]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "path, body, waiting",
    [(*CHAT, 4), ("/v1/completions", {"prompt": "a", "n": 4}, 4), (*SEVERAL, 2)],
    ids=["chat", "n", "several"],
)
def test_what_does_not_fit_the_queue_is_refused_whole(gated, path, body, waiting, stream):
    connections = fill(gated, waiting)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(httpx.post(gated.url + path, json=body | {"stream": stream}, timeout=60)))
    asking.start()
    gated.arrived()
    gated.go(1)
    asking.join()
    [answer] = answers
    assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
    assert answer.json()["error"]["code"] == "queue_full" and answer.json()["error"]["type"] == "rate_limit_error"
    gated.free()
    assert [connection.getresponse().status for connection in connections] == [200, 200]
    for connection in connections:
        connection.close()
    refused = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    assert gated.number("request_failure_total", code="queue_full") == refused
    assert gated.number("request_success_total", finished_reason="length") == 4 + waiting
    assert gated.engine.stats()["output_tokens"] == 400 + 2 * waiting


def test_a_list_longer_than_the_queue_takes_its_turns(gated):
    gated.free()
    body = {"prompt": ["a", "b"] * 10, "max_tokens": 3, "ignore_eos": True, "temperature": 0}
    answer = httpx.post(f"{gated.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == texts[:2] * 10 and answer["usage"]["completion_tokens"] == 60


def test_the_real_client_comes_again(gated):
    connections = fill(gated, 4)
    client = openai.OpenAI(base_url=f"{gated.url}/v1", api_key="none", max_retries=5)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(client.completions.create(model=MODEL, prompt="a", max_tokens=2)))
    asking.start()
    gated.arrived()
    gated.go(1)
    gated.until(lambda: gated.number("errors_total", code="queue_full") >= 1)
    gated.free()
    asking.join()
    assert answers[0].usage.completion_tokens > 0
    for connection in connections:
        assert connection.getresponse().status == 200
        connection.close()


def test_one_bad_prompt_of_several_takes_the_others_with_it(gated):
    gated.free()
    answer = httpx.post(f"{gated.url}/v1/completions", json={"prompt": ["a", "b" * 5000, "c"], "max_tokens": 5})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    gated.until(lambda: gated.number("num_requests_waiting") == gated.number("num_requests_running") == 0)
    assert gated.engine.stats()["output_tokens"] == 0
