"""Adapters as model names: listed, chosen, loaded and unloaded by a real client, beside the base model."""

from __future__ import annotations

import logging
import threading
import time

import httpx
import openai
import peft
import pytest
from peft_adapters import LAYERS, WARNINGS, shake
from server_parts import MODEL, make_model, make_tokenizer, serving

from hf_paged import Engine, EngineConfig
from hf_paged.integrations.openai import Settings, create_app
from hf_paged.integrations.openai.settings import Limits

pytestmark = pytest.mark.filterwarnings(*WARNINGS)

PROMPT = "Name a river in the north."


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> tuple[dict, dict]:
    """(stock's models by adapter, folders by adapter)"""
    models, folders = {MODEL: make_model()}, {}
    for seed, name in enumerate(("one", "two"), 1):
        model = peft.get_peft_model(make_model(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, **LAYERS))
        shake(model, seed)
        folders[name] = tmp_path_factory.mktemp(name)
        model.eval().save_pretrained(folders[name])
        models[name] = model
    return models, folders


@pytest.fixture
def address(adapters):
    """A server that has "one" from the beginning."""
    engine = Engine(make_model(), make_tokenizer(), EngineConfig(max_num_seqs=16))
    engine.load_adapter("one", adapters[1]["one"])
    settings = Settings(model_name=MODEL, enable_adapters=True, limits=Limits(adapters=3, adapter_rank=8))
    with serving(create_app(engine, settings)) as address:
        yield address
    assert engine.closed


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(model, tokenizer, count: int) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    output = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def complete(client, model: str, count: int = 12) -> str:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=count, temperature=0)
    assert answer.model == model
    return answer.choices[0].text


def post(address: str, route: str, **body) -> httpx.Response:
    return httpx.post(f"{address}/v1/{route}", json=body)


def test_clients_choose_load_and_unload(address, client, adapters):
    models, folders = adapters
    tokenizer = make_tokenizer()
    answer = post(address, "load_lora_adapter", lora_name="two", lora_path=str(folders["two"]))
    assert answer.status_code == 200 and answer.text == "Success: LoRA adapter 'two' added successfully."
    listed = {model.id: model.parent for model in client.models.list()}
    assert listed == {MODEL: None, "one": MODEL, "two": MODEL}
    assert client.models.retrieve("two").parent == MODEL
    found: dict[str, str] = {}
    threads = [threading.Thread(target=lambda name=name: found.update({name: complete(client, name)})) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: expected(model, tokenizer, 12) for name, model in models.items()}
    assert len(set(found.values())) == 3
    for name in ("one", "two"):
        chat = dict(model=name, messages=[{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0)
        whole = client.chat.completions.create(**chat)
        pieces = list(client.chat.completions.create(**chat, stream=True))
        assert {piece.model for piece in pieces} == {name} == {whole.model}
        assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
        response = client.responses.create(model=name, input="Hello", max_output_tokens=8, temperature=0)
        assert response.model == name and response.output_text == whole.choices[0].message.content
    vectors = {name: client.embeddings.create(model=name, input=PROMPT, encoding_format="float") for name in models}
    assert all(answer.model == name for name, answer in vectors.items())
    assert len({tuple(answer.data[0].embedding) for answer in vectors.values()}) == 3
    assert post(address, "unload_lora_adapter", lora_name="two").status_code == 200
    with pytest.raises(openai.NotFoundError, match="model 'two' is not here"):
        complete(client, "two")
    assert complete(client, "one") == found["one"]


def test_what_is_wrong_is_said_by_field(address, client, adapters, tmp_path):
    _, folders = adapters
    cases = [
        (dict(lora_name="one", lora_path=str(folders["two"])), 400, "lora_name"),
        (dict(lora_name=MODEL, lora_path=str(folders["two"])), 400, "lora_name"),
        (dict(lora_name="new", lora_path=str(tmp_path)), 400, "lora_path"),
        (dict(lora_name="new", lora_path=""), 400, "lora_path"),
        (dict(lora_name="new"), 400, "lora_path"),
        (dict(lora_name="new", lora_path=str(folders["two"]), base_model_name="x"), 400, "base_model_name"),
    ]
    for body, status, field in cases:
        answer = post(address, "load_lora_adapter", **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, field), body
    big = peft.get_peft_model(make_model(), peft.LoraConfig(task_type="CAUSAL_LM", r=9, **LAYERS))
    big.save_pretrained(tmp_path)
    answer = post(address, "load_lora_adapter", lora_name="big", lora_path=str(tmp_path))
    assert answer.status_code == 400 and "rank 9, above max_rank 8" in answer.json()["error"]["message"]
    for name in ("two", "three"):
        assert post(address, "load_lora_adapter", lora_name=name, lora_path=str(folders["two"])).status_code == 200
    full = post(address, "load_lora_adapter", lora_name="four", lora_path=str(folders["two"]))
    assert full.status_code == 429 and "3 adapters are loaded" in full.json()["error"]["message"]
    missing = post(address, "unload_lora_adapter", lora_name="nobody")
    assert missing.status_code == 404 and missing.json()["error"]["param"] == "lora_name"
    assert complete(client, MODEL)


def test_an_adapter_in_use_stays(address, client):
    stream = client.completions.create(model="one", prompt=PROMPT, max_tokens=200, stream=True, extra_body={"ignore_eos": True})
    with stream:
        next(iter(stream))
        answer = post(address, "unload_lora_adapter", lora_name="one")
    assert answer.status_code == 400 and "1 unfinished requests have it" in answer.json()["error"]["message"]


def test_loading_is_off_unless_it_is_asked_for(adapters):
    engine = Engine(make_model(), make_tokenizer())
    engine.load_adapter("one", adapters[1]["one"])
    with serving(create_app(engine, Settings(model_name=MODEL))) as address:
        assert post(address, "load_lora_adapter", lora_name="two", lora_path="/").status_code == 404
        assert post(address, "completions", model="one", prompt="Hi", max_tokens=2).status_code == 200


def test_the_log_tells_which_adapter_answered(client, caplog):
    caplog.set_level(logging.INFO, "hf_paged.access")
    for name in ("one", MODEL):
        complete(client, name, 2)
    until = time.monotonic() + 10
    while len(caplog.records) < 2 and time.monotonic() < until:  # a line is written a moment after the answer
        time.sleep(0.01)
    assert [record.fields["model"] for record in caplog.records] == ["one", MODEL]
