"""Under `--policy fair`, users of a server are served alike, whatever each asks for."""

from __future__ import annotations

import threading
import time

import httpx
import openai
import pytest
from server_parts import MODEL, make_model, make_tokenizer, serving

from hf_paged import Engine, EngineConfig
from hf_paged.integrations.openai import Settings, create_app

KEYS = ("greedy-key", "modest-key")


@pytest.fixture(scope="module")
def servers():
    """(engine, url) by whether there are API keys; each runs one request at a time."""
    config = EngineConfig(max_num_seqs=1, policy="fair")
    with Engine(make_model(), make_tokenizer(), config) as plain, Engine(make_model(), make_tokenizer(), config) as guarded:
        with serving(create_app(plain, Settings(model_name=MODEL))) as url:
            with serving(create_app(guarded, Settings(model_name=MODEL, api_keys=KEYS))) as guarded_url:
                yield {False: (plain, url), True: (guarded, guarded_url)}


def waiting(engine: Engine, count: int) -> None:
    until = time.monotonic() + 30
    while engine.stats()["waiting"] != count and time.monotonic() < until:
        time.sleep(0.005)
    assert engine.stats()["waiting"] == count


GREEDY_AND_MODEST = {
    "user": ({"user": "greedy"}, {"user": "modest"}),
    "safety identifier": ({"safety_identifier": "greedy"}, {"safety_identifier": "modest"}),
    "nobody and somebody": ({}, {"user": "modest"}),
    "API key": ({"key": KEYS[0]}, {"key": KEYS[1]}),
    "API key, whoever it speaks for": ({"key": KEYS[0], "user": "somebody {}"}, {"key": KEYS[1]}),
}


@pytest.mark.parametrize("name", GREEDY_AND_MODEST)
def test_who_asks_for_little_is_served_next(servers, name):
    greedy, modest = GREEDY_AND_MODEST[name]
    engine, url = servers["key" in greedy]
    ended: list[str] = []

    def ask(who: str, about: dict, number: int, max_tokens: int) -> None:
        about = {field: value.format(number) for field, value in about.items()}
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=about.pop("key", "none"), max_retries=0)
        body = {"ignore_eos": True, **about}
        client.completions.create(model=MODEL, prompt=f"{who} {number}", max_tokens=max_tokens, extra_body=body)
        ended.append(who)

    threads = [threading.Thread(target=ask, args=("greedy", greedy, 0, 300))]
    threads[0].start()
    while not engine.stats()["running"]:
        time.sleep(0.005)
    for number in range(1, 7):
        threads.append(threading.Thread(target=ask, args=("greedy", greedy, number, 20)))
        threads[-1].start()
    waiting(engine, 6)
    threads.append(threading.Thread(target=ask, args=("modest", modest, 0, 20)))
    threads[-1].start()
    for thread in threads:
        thread.join()
    assert ended[1] == "modest", ended


def test_metrics_tell_of_users_but_not_who_they_are(servers):
    engine, url = servers[False]
    text = httpx.get(f"{url}/metrics").raise_for_status().text
    assert f'hf_paged:scheduling_policy{{model_name="{MODEL}",policy="fair"}} 1.0' in text
    for name in ("num_users", "num_users_waiting", "user_service_gap_tokens"):
        assert f'hf_paged:{name}{{model_name="{MODEL}"}} 0.0' in text
    assert "greedy" not in text and "modest" not in text


def test_names_of_any_length_take_little_memory(servers):
    engine, url = servers[False]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    client.completions.create(model=MODEL, prompt="a", max_tokens=1, user="x" * 1_000_000)
    assert max(map(len, engine._scheduler._policy._served)) == 64
