"""A real uvicorn server on a real socket, over a tiny model."""

from __future__ import annotations

import time

import pytest
from server_parts import MODEL, make_model, make_tokenizer, serving

from hf_paged import Engine, EngineConfig
from hf_paged.integrations.openai import Settings, create_app


@pytest.fixture(scope="module")
def engine():
    return Engine(make_model(), make_tokenizer(), EngineConfig(max_num_seqs=16, max_queue=256))


@pytest.fixture(scope="module")
def url(engine):
    with serving(create_app(engine, Settings(model_name=MODEL))) as url:
        yield url
    assert engine.closed


@pytest.fixture(autouse=True)
def nothing_left(request):
    """After every test the engine has nothing to do, and no memory in use."""
    yield
    if "url" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        until = time.monotonic() + 10
        while engine.has_unfinished() and time.monotonic() < until:
            time.sleep(0.01)
        assert not engine.has_unfinished()
        assert engine.stats()["kv_bytes_in_use"] == 0
        engine.check_integrity()
