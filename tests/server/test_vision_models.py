"""A model that sees, served for text: it is loaded from its folder, and an image is refused by name."""

from __future__ import annotations

import openai
import pytest
import torch
from server_parts import make_tokenizer, serving
from tiny_configs import MROPE
from tiny_models import tiny_model

from hf_paged import Engine
from hf_paged.hf.build import load_model
from hf_paged.integrations.openai import Settings, create_app

PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2_vl", text_config=dict(MROPE, vocab_size=320))


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    engine = Engine(*load_model(str(folder), device="cpu"))
    assert isinstance(engine.model.module, type(model))
    return engine


@pytest.fixture(scope="module")
def url(engine):
    with serving(create_app(engine, Settings(model_name="vision"))) as url:
        yield url


def test_it_answers_chats_with_stocks_tokens(model, url):
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="vision", messages=messages, temperature=0, max_tokens=8)
    assert answer.choices[0].message.content == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.usage.prompt_tokens == ids.shape[1]


def test_images_are_refused_by_name(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    content = [{"type": "text", "text": "hello"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    with pytest.raises(openai.BadRequestError, match="takes no images") as refusal:
        client.chat.completions.create(model="vision", messages=[{"role": "user", "content": content}])
    assert refusal.value.param == "messages.0.content.1.image_url"
    with pytest.raises(openai.BadRequestError, match="the user's") as refusal:
        client.chat.completions.create(model="vision", messages=[{"role": "system", "content": content}])
    content[1]["image_url"]["detail"] = "low"
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="vision", messages=[{"role": "user", "content": content}])
    assert refusal.value.param == "messages.0.content.1.image_url.detail"
    content = [{"type": "input_image", "image_url": PIXEL}]
    with pytest.raises(openai.BadRequestError, match="takes no images") as refusal:
        client.responses.create(model="vision", input=[{"role": "user", "content": content}])
    assert refusal.value.param.startswith("input")
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(model="vision", input=[{"role": "system", "content": content}])
    assert refusal.value.param == "input.0.content.0.image_url"
