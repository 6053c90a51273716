"""Embeddings, scores, ranks and classes over HTTP: what the engine gives in process, and stock transformers."""

from __future__ import annotations

import asyncio
import base64

import httpx
import numpy
import openai
import pytest
import torch
from server_parts import MODEL, make_model, make_tokenizer, serving
from tiny_models import tiny_config
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_paged import Engine, EngineConfig
from hf_paged.integrations.openai import Settings, create_app
from hf_paged.integrations.openai.settings import Limits

TEXTS = ["the cat sat on the mat", "rain", "a longer text about the weather in the north sea"]


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def headed(num_labels: int, **settings):
    config = tiny_config("llama", vocab_size=320)
    for name, value in {"num_labels": num_labels, "pad_token_id": 0, **settings}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def served(model, **options):
    engine = Engine(model, make_tokenizer(), EngineConfig(max_num_seqs=4))
    return serving(create_app(engine, Settings(model_name=MODEL, **options)))


@pytest.fixture(scope="module")
def cross_encoder():
    with served(headed(1)) as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture(scope="module")
def classifier():
    with served(headed(3, id2label={0: "bad", 1: "fair", 2: "good"})) as url, httpx.Client(base_url=url) as client:
        yield client


@torch.no_grad()
def stock(texts, pooling="mean") -> numpy.ndarray:
    model, tokenizer, rows = make_model(), make_tokenizer(), []
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids if isinstance(text, str) else text])
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        rows.append({"mean": hidden.mean(0), "last": hidden[-1], "cls": hidden[0]}[pooling])
    return torch.stack(rows).numpy()


def unit(vectors: numpy.ndarray) -> numpy.ndarray:
    return vectors / numpy.linalg.norm(vectors, axis=-1, keepdims=True)


@torch.no_grad()
def stock_logits(model, *texts) -> numpy.ndarray:
    return model(input_ids=torch.tensor([make_tokenizer()(*texts).input_ids])).logits[0].numpy()


# -- /v1/embeddings


def test_the_client_gets_stocks_vectors_in_either_encoding(client):
    for options in ({}, {"encoding_format": "float"}):  # unasked, the client wants base64
        answer = client.embeddings.create(model=MODEL, input=TEXTS, **options)
        assert [one.index for one in answer.data] == [0, 1, 2] and answer.model == MODEL
        numpy.testing.assert_allclose([one.embedding for one in answer.data], unit(stock(TEXTS)), atol=1e-5)
        tokens = sum(len(ids) for ids in make_tokenizer()(TEXTS).input_ids)
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)


def test_base64_is_little_endian_float32(client):
    answer = client.embeddings.with_raw_response.create(model=MODEL, input="rain", encoding_format="base64")
    encoded = answer.http_response.json()["data"][0]["embedding"]
    vector = numpy.frombuffer(base64.b64decode(encoded), "<f4")
    numpy.testing.assert_allclose(vector, unit(stock(["rain"]))[0], atol=1e-5)


@pytest.mark.parametrize("given, texts", [("rain", ["rain"]), ([5, 9, 11], [[5, 9, 11]]), ([[5, 9], [7]], [[5, 9], [7]])])
def test_inputs_come_in_all_of_openais_forms(client, given, texts):
    answer = client.embeddings.create(model=MODEL, input=given, user="somebody")
    numpy.testing.assert_allclose([one.embedding for one in answer.data], unit(stock(texts)), atol=1e-5)


def test_dimensions_pooling_and_length_are_honoured(client, engine):
    create = lambda **options: numpy.array(  # noqa: E731
        client.embeddings.create(model=MODEL, input=["rain"], **options).data[0].embedding
    )
    (full,) = stock(["rain"])
    numpy.testing.assert_allclose(create(dimensions=5), unit(full[:5]), atol=1e-5)
    numpy.testing.assert_allclose(create(extra_body={"normalize": False}), full, atol=1e-5)
    (last,) = stock(["rain"], "last")
    numpy.testing.assert_allclose(create(extra_body={"pooling": "last"}), unit(last), atol=1e-5)
    cut = make_tokenizer()("rain").input_ids[:2]
    numpy.testing.assert_allclose(create(extra_body={"truncate_prompt_tokens": 2}), unit(stock([cut])[0]), atol=1e-5)
    assert engine.tokenizer.backend_tokenizer.truncation is None  # it would cut other requests' texts


def test_many_inputs_wait_their_turn(client):
    inputs = [[5 + place % 200, 9] for place in range(600)]  # more than the queue takes
    answer = client.embeddings.create(model=MODEL, input=inputs)
    found = [one.embedding for one in answer.data]
    numpy.testing.assert_allclose(found[::97], unit(stock(inputs[::97])), atol=1e-5)


def test_embeddings_and_chats_run_side_by_side(url):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            say = lambda: client.completions.create(model=MODEL, prompt="rain", temperature=0, max_tokens=12)  # noqa: E731
            embed = lambda: client.embeddings.create(model=MODEL, input=TEXTS)  # noqa: E731
            alone = await say()
            *said, vectors = await asyncio.gather(say(), say(), embed(), embed(), embed(), say(), embed())
            return alone.choices[0].text, [one.choices[0].text for one in said if hasattr(one, "choices")], vectors

    alone, said, vectors = asyncio.run(run())
    assert said == [alone] * 3
    numpy.testing.assert_allclose([one.embedding for one in vectors.data], unit(stock(TEXTS)), atol=1e-5)


@pytest.mark.parametrize(
    "fields, param, message",
    [
        ({"input": []}, "input", "input is empty"),
        ({"input": ""}, "input", "input is empty"),
        ({"input": [[5], []]}, "input", "input is empty"),
        ({"input": [999]}, "input", "outside the vocabulary"),
        ({"input": [["rain"]]}, None, "input"),
        ({"input": [0.5]}, None, "input"),
        ({"input": ["rain"] * 2000}, "input", "2000 are more than the 1024 allowed"),
        ({"input": "rain " * 3000}, "input", "tokens"),
        ({"dimensions": 0}, "dimensions", "positive integer"),
        ({"dimensions": 10**9}, "dimensions", "at most 48"),
        ({"pooling": "max"}, "pooling", "pooling"),
        ({"encoding_format": "int8"}, "encoding_format", "encoding_format"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "it must be -1, or from 1 to"),
        ({"truncate_prompt_tokens": 2**70}, "truncate_prompt_tokens", "it must be -1, or from 1 to"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than or equal to -1"),
        ({"priority": 3}, "priority", "no effect"),
        ({"prompt": "rain"}, "prompt", "not a field"),
        ({"model": "other"}, "model", "is not here"),
    ],
)
def test_what_is_wrong_is_named(url, fields, param, message):
    answer = httpx.post(f"{url}/v1/embeddings", json={"model": MODEL, "input": "rain", **fields})
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    error = answer.json()["error"]
    assert message in error["message"] and (param is None or error["param"] == param)


# -- /v1/score, /v1/rerank


def test_scores_without_a_head_are_cosines(url):
    vectors = unit(stock(TEXTS))
    answer = httpx.post(f"{url}/v1/score", json={"model": MODEL, "text_1": TEXTS[0], "text_2": TEXTS[1:]}).json()
    found = [one["score"] for one in answer["data"]]
    numpy.testing.assert_allclose(found, vectors[1:] @ vectors[0], atol=1e-5)
    assert answer["object"] == "list" and [one["index"] for one in answer["data"]] == [0, 1]
    pairs = httpx.post(f"{url}/score", json={"text_1": TEXTS[:2], "text_2": TEXTS[1:]}).json()["data"]
    expected = [vectors[0] @ vectors[1], vectors[1] @ vectors[2]]
    numpy.testing.assert_allclose([one["score"] for one in pairs], expected, atol=1e-5)


def test_documents_are_ranked_by_their_cosine(url):
    vectors = unit(stock(TEXTS))
    body = {"model": MODEL, "query": TEXTS[0], "documents": [TEXTS[1], {"text": TEXTS[2]}, TEXTS[0]], "top_n": 2}
    answer = httpx.post(f"{url}/v1/rerank", json=body).json()
    assert answer["results"][0] == {
        "index": 2,
        "document": {"text": TEXTS[0]},
        "relevance_score": pytest.approx(1.0, abs=1e-5),
    }
    second = max((0, 1), key=lambda place: vectors[place + 1] @ vectors[0])
    assert [one["index"] for one in answer["results"]] == [2, second]
    bare = httpx.post(f"{url}/rerank", json={**body, "return_documents": False}).json()["results"]
    assert all("document" not in one for one in bare)


def test_a_cross_encoder_reads_pairs(cross_encoder):
    model = headed(1)
    logits = [float(stock_logits(model, TEXTS[0], text)[0]) for text in TEXTS]
    body = {"text_1": TEXTS[0], "text_2": TEXTS}
    found = [one["score"] for one in cross_encoder.post("/v1/score", json=body).json()["data"]]
    numpy.testing.assert_allclose(found, 1 / (1 + numpy.exp(-numpy.array(logits))), atol=1e-5)
    raw = cross_encoder.post("/v1/score", json={**body, "use_activation": False}).json()["data"]
    numpy.testing.assert_allclose([one["score"] for one in raw], logits, atol=1e-5)
    ranked = cross_encoder.post("/v2/rerank", json={"query": TEXTS[0], "documents": TEXTS}).json()
    assert [one["index"] for one in ranked["results"]] == sorted(range(3), key=lambda place: -logits[place])
    assert ranked["usage"]["prompt_tokens"] == sum(len(make_tokenizer()(TEXTS[0], text).input_ids) for text in TEXTS)


@pytest.mark.parametrize(
    "path, fields, message",
    [
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a"]}, "text_1 has 2 texts, text_2 1"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2 is empty"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "use_activation": True}, "use_activation"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents is empty"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": [3]}, "documents"),
        ("/classify", {"input": "a"}, "has no head for classifying"),
    ],
)
def test_what_is_wrong_with_pairs_is_named(url, path, fields, message):
    answer = httpx.post(url + path, json=fields)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


# -- /classify, and models that do nothing else


def test_classes_are_named_as_the_config_names_them(classifier):
    model = headed(3)
    answer = classifier.post("/classify", json={"model": MODEL, "input": TEXTS}).json()
    for one, text in zip(answer["data"], TEXTS, strict=True):
        logits = torch.from_numpy(stock_logits(model, text))
        numpy.testing.assert_allclose(one["probs"], logits.softmax(-1), atol=1e-5)
        assert one["label"] == ["bad", "fair", "good"][int(logits.argmax())] and one["num_classes"] == 3
    (raw,) = classifier.post("/v1/classify", json={"input": TEXTS[0], "use_activation": False}).json()["data"]
    numpy.testing.assert_allclose(raw["probs"], stock_logits(model, TEXTS[0]), atol=1e-5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path, fields",
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "rain"}]}),
        ("/v1/completions", {"prompt": "rain"}),
    ],
)
def test_a_model_without_a_language_head_says_so(classifier, path, fields, stream):
    answer = classifier.post(path, json={**fields, "stream": stream})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"
    assert "LlamaForSequenceClassification has no language model head" in answer.json()["error"]["message"]


def test_several_labels_score_no_pairs(classifier):
    answer = classifier.post("/score", json={"text_1": "a", "text_2": "b"})
    assert answer.status_code == 400 and "3 labels" in answer.json()["error"]["message"]


def test_a_model_without_a_head_serves_its_vectors():
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config("qwen3", vocab_size=320)).eval()
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([[5, 9, 11]])).last_hidden_state[0].mean(0)
    with served(model, limits=Limits(prompts=2)) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = client.embeddings.create(model=MODEL, input=[5, 9, 11])
            numpy.testing.assert_allclose(answer.data[0].embedding, unit(hidden.numpy()), atol=1e-5)
            with pytest.raises(openai.BadRequestError, match="3 are more than the 2 allowed"):
                client.embeddings.create(model=MODEL, input=["a", "b", "c"])
            with pytest.raises(openai.BadRequestError, match="Qwen3Model has no language model head"):
                client.completions.create(model=MODEL, prompt="rain")
