"""The real openai client, unchanged, against the server; the answers are those of the engine and of stock transformers."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
import torch
from pydantic import BaseModel
from server_parts import EOS, MODEL, make_model, make_tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me"}]


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def stock(prompt_ids: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt_ids])
    out = make_model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
    return out[0, len(prompt_ids) :].tolist()


def templated() -> list[int]:
    tokenizer = make_tokenizer()
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def test_chat_is_greedy_stock_generate_on_the_same_template(client):
    expected = stock(templated(), 20)
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20, temperature=0)
    choice = answer.choices[0]
    text = make_tokenizer().decode(expected, skip_special_tokens=True)
    assert choice.message.content == text and choice.message.role == "assistant"
    assert choice.finish_reason == ("stop" if expected[-1] == EOS else "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(templated()), len(expected))
    assert answer.usage.total_tokens == len(templated()) + len(expected)


def test_streams_add_up_to_the_whole_answer(client):
    options = dict(model=MODEL, messages=MESSAGES, max_tokens=20, n=3, seed=5, temperature=0.9, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**options)
    texts, reasons, logprobs, roles, usage = [""] * 3, [None] * 3, [[], [], []], [0] * 3, None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role == "assistant"
            reasons[choice.index] = choice.finish_reason
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
        usage = chunk.usage or usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices] and roles == [1] * 3
    assert logprobs == [choice.logprobs.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_a_prompt_that_was_seen_is_counted_as_cached(client):
    messages = [{"role": "user", "content": "a long question, word by word, " * 4}]
    first, again = (client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens >= again.usage.prompt_tokens // 2
    salted = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, extra_body={"cache_salt": "mine"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_completions_of_several_prompts(client):
    prompts = ["Tell me", "the rain", [80, 81, 82]]
    answer = client.completions.create(model=MODEL, prompt=prompts[:2], max_tokens=8, temperature=0, n=1)
    tokenizer = make_tokenizer()
    for choice, prompt in zip(answer.choices, prompts):
        assert choice.text == tokenizer.decode(stock(tokenizer(prompt).input_ids, 8), skip_special_tokens=True)
    answer = client.completions.create(model=MODEL, prompt=prompts[2], max_tokens=8, temperature=0, echo=True)
    assert answer.choices[0].text == tokenizer.decode(prompts[2] + stock(prompts[2], 8), skip_special_tokens=True)


def test_a_text_is_scored_by_echo_without_new_tokens(client):
    answer = client.completions.create(model=MODEL, prompt="Tell me", max_tokens=0, echo=True, logprobs=1)
    choice, ids = answer.choices[0], make_tokenizer()("Tell me").input_ids
    logits = make_model()(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [logits[i, token].item() for i, token in enumerate(ids[1:])]
    assert choice.text == "Tell me" and answer.usage.completion_tokens == 0
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    text = "".join(choice.logprobs.tokens[1:])
    assert "Tell me".endswith(text)


class Answer(BaseModel):
    kind: str
    count: int


def test_parsed_answers(client):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["kind", "count"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=format, max_tokens=100)
    assert Answer.model_validate_json(answer.choices[0].message.content).kind in "ab"
    short = {"regex": "[a-f]{4}"}
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"structured_outputs": short})
    assert len(answer.choices[0].message.content) == 4


def test_many_at_once_get_their_own_answers(url):
    prompts = [f"question {i} of many" for i in range(40)]
    tokenizer, model = make_tokenizer(), make_model()
    expected = []
    for prompt in prompts[:8]:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(out, skip_special_tokens=True))

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def one(place: int, prompt: str) -> str:
                options = dict(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)
                if place % 2:
                    return (await client.completions.create(**options)).choices[0].text
                text = ""
                async for chunk in await client.completions.create(**options, stream=True):
                    text += chunk.choices[0].text
                return text

            return await asyncio.gather(*(one(place, prompt) for place, prompt in enumerate(prompts)))

    answers = asyncio.run(main())
    assert answers[:8] == expected
    assert len(set(answers)) > 20


def test_leaving_a_stream_ends_its_request(client, engine):
    stream = client.completions.create(model=MODEL, prompt="Tell me", max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert engine.has_unfinished()
    stream.close()  # the fixture waits until the engine is idle, well before 400 tokens


@pytest.mark.parametrize(
    "options, param",
    [
        (dict(temperature=-1), "temperature"),
        (dict(temperature="warm"), "temperature"),
        (dict(top_p=2), "top_p"),
        (dict(n=0), "n"),
        (dict(n=10**6), "n"),
        (dict(stop=["a"] * 100), "stop"),
        (dict(logit_bias={"x": 1}), "logit_bias"),
        (dict(logit_bias={"99999": 1}), "logit_bias"),
        (dict(logprobs=True, top_logprobs=1000), "logprobs"),
        (dict(top_logprobs=3), "top_logprobs"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(extra_body={"nonsense": 1}), "nonsense"),
        (dict(extra_body={"chat_template": "{{ 1 }}"}), "chat_template"),
        (dict(extra_body={"structured_outputs": {"regex": "("}}), "structured_outputs"),
        (dict(response_format={"type": "json_schema"}), "response_format.json_schema"),
        (dict(messages=[]), "messages"),
        (dict(messages=[{"role": "king", "content": "x"}]), "messages.0.role"),
        (dict(messages=[{"role": "user", "content": "x" * 5000}]), "max_tokens"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_named(client, options, param, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "stream": stream} | options)
    assert caught.value.body["param"] == param and caught.value.body["message"]


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).max_model_len == 512


def test_tokens(client):
    answer = client.with_options(base_url=str(client.base_url).removesuffix("/v1/")).post(
        "/tokenize", body={"messages": MESSAGES}, cast_to=object
    )
    assert answer["tokens"] == templated() and answer["count"] == len(templated())
    answer = client.with_options(base_url=str(client.base_url).removesuffix("/v1/")).post(
        "/detokenize", body={"tokens": templated()}, cast_to=object
    )
    assert answer["prompt"] == make_tokenizer().decode(templated())
    assert json.dumps(answer)


def test_what_says_nothing_to_a_model_is_taken(client):
    options = dict(user="me", metadata={"a": "b"}, safety_identifier="x", prompt_cache_key="y", service_tier="auto", store=False)
    asked = dict(model=MODEL, messages=MESSAGES, max_tokens=4, temperature=0)
    answers = [client.chat.completions.create(**asked, **more) for more in ({}, options)]
    assert answers[0].choices == answers[1].choices
    for wrong in ({"store": True}, {"service_tier": "flex"}, {"metadata": {"a": "b" * 513}}, {"modalities": ["audio"]}):
        with pytest.raises(openai.BadRequestError) as info:
            client.chat.completions.create(**asked, **wrong)
        assert info.value.param.startswith(next(iter(wrong)))
