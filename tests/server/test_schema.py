"""schemathesis asks what the app's own OpenAPI schema allows, and much that it does not: no answer is a 5xx, and every
answer has a status and a form that the schema names."""

from __future__ import annotations

import pytest
import schemathesis
from schemathesis.engine import events, from_schema
from server_parts import MODEL, make_model, make_tokenizer, serving

from hf_paged import Engine, EngineConfig
from hf_paged.integrations.openai import Settings, create_app

KEY = "key"


@pytest.fixture(scope="module")
def address():
    """Answers are short, as no more fits."""
    engine = Engine(make_model(), make_tokenizer(), EngineConfig(max_num_seqs=16, max_queue=256, max_model_len=48))
    with serving(create_app(engine, Settings(model_name=MODEL, api_keys=(KEY,)))) as url:
        yield url
        assert not engine.has_unfinished() and engine.stats()["kv_bytes_in_use"] == 0
        engine.check_integrity()


def failures(url: str, most: int, **phases) -> set[str]:
    """What schemathesis finds wrong with the server's answers to so many examples of each route."""
    settings = {
        "generation": {"mode": "all", "deterministic": True, "max-examples": most},
        "phases": {"stateful": {"enabled": False}} | phases,
        "continue-on-failure": True,
        "auth": {"openapi": {"bearer": {"bearer": KEY}}},
        # limits and rules between fields are in no schema, so what fits the schema may still be refused
        "checks": {"positive_data_acceptance": {"enabled": False}},
    }
    config = schemathesis.Config.from_dict(settings)
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config, headers=headers)
    found, asked = set(), 0
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            found.add(str(event.info))
        if isinstance(event, events.ScenarioFinished):
            asked += len(event.recorder.interactions)
            for checks in event.recorder.checks.values():
                for check in checks:
                    if check.failure_info is not None:
                        failure = check.failure_info.failure
                        found.add(f"{check.name}: {failure}\n{check.failure_info.code_sample}")
    assert asked >= most
    return found


def test_answers_are_as_described(address):
    assert not failures(address, 8, examples={"enabled": False}, coverage={"enabled": False})


@pytest.mark.slow
def test_many_answers_are_as_described(address):
    """All values at the bounds of the schema, too: some minutes."""
    assert not failures(address, 100)
