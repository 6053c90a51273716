"""Models that see, behind the server: the answers are stock transformers' on the same pictures, however they were sent."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import openai
import pytest
import torch
from peft_adapters import WARNINGS, shake
from pictures import data_url, encoded
from pictures import picture as drawn
from PIL import Image
from server_parts import make_tokenizer, serving
from tiny_configs import MROPE
from tiny_models import tiny_model
from tiny_processors import tiny_pair
from typer.testing import CliRunner

from hf_paged import Engine, EngineConfig, ImageLimits
from hf_paged.cli.app import app
from hf_paged.hf.build import load_model, load_processor
from hf_paged.integrations.openai import Settings, create_app
from hf_paged.integrations.openai.settings import Limits

MODEL = "vision"


def picture(seed: int, *size: int) -> bytes:
    return encoded(drawn(seed, *size))


def said(*parts: str | bytes) -> list[dict]:
    """One message of the user's, of texts, pictures, and addresses of pictures."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str) and not part.startswith("http")
        else {"type": "image_url", "image_url": {"url": part if isinstance(part, str) else data_url(part)}}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


class Pictures(BaseHTTPRequestHandler):
    def do_GET(self):
        found = self.path == "/1.png"
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        self.wfile.write(picture(1) if found else b"")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def pictures():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def label(request):
    return request.param


@pytest.fixture(scope="module")
def engine(label):
    model, processor, _ = tiny_pair(label)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id  # for answers of a form
    limits = ImageLimits(max_count=3, max_pixels=10_000)
    return Engine(model, processor, EngineConfig(max_num_seqs=8, max_batch_tokens=32, images=limits, block_size=16))


@pytest.fixture(scope="module")
def url(engine, pictures):
    settings = Settings(model_name=MODEL, allowed_media_hosts=(pictures,), limits=Limits(image_bytes=50_000))
    with serving(create_app(engine, settings)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def stock(label):
    """What stock transformers answers: (text, tokens of the prompt)."""
    model, processor, _ = tiny_pair(label)

    def answer(*parts: str | bytes, num_tokens: int = 8) -> tuple[str, int]:
        contents = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        messages = [{"role": "user", "content": contents}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = [Image.open(io.BytesIO(part)) for part in parts if isinstance(part, bytes)]
        inputs = processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
        count = inputs["input_ids"].shape[1]
        return processor.tokenizer.decode(output[0, count:], skip_special_tokens=True), count

    return answer


GREEDY = dict(model=MODEL, temperature=0, max_tokens=8, extra_body={"ignore_eos": True})


def test_answers_are_stocks(client, stock):
    for parts in (["what is ", picture(1), "?"], [picture(2), picture(1, 30, 9), "compare"], ["hello"]):
        text, count = stock(*parts)
        answer = client.chat.completions.create(messages=said(*parts), **GREEDY)
        assert answer.choices[0].message.content == text
        assert answer.usage.prompt_tokens == count


def test_streams_samples_and_forms(client, stock):
    parts = ["what is ", picture(1), "?"]
    chunks = client.chat.completions.create(
        messages=said(*parts), stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(chunks)
    text, count = stock(*parts)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.prompt_tokens == count
    sampled = dict(GREEDY, temperature=1, seed=3, n=3)
    several, again = (client.chat.completions.create(messages=said(*parts), **sampled) for _ in range(2))
    assert [c.message.content for c in several.choices] == [c.message.content for c in again.choices]
    assert len({choice.message.content for choice in several.choices}) > 1
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2]}}}
    answer = client.chat.completions.create(model=MODEL, messages=said(*parts), response_format=form, max_tokens=8)
    assert json.loads(answer.choices[0].message.content) in (1, 2)


def test_an_image_is_fetched_from_a_host_on_the_list(client, stock, pictures):
    answer = client.chat.completions.create(messages=said("what is ", f"http://{pictures}/1.png", "?"), **GREEDY)
    assert answer.choices[0].message.content == stock("what is ", picture(1), "?")[0]


def test_an_image_that_was_seen_is_counted_as_cached(client, engine):
    parts = ["a long question, word by word, about ", picture(7), " in many a word, and some more"]
    first, again, other = (
        client.chat.completions.create(messages=said(parts[0], picture(seed), parts[2]), **GREEDY) for seed in (7, 7, 8)
    )
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, again, other)]
    before = len("user:" + parts[0])  # the tokenizer knows about every character
    assert cached[0] < before and cached[1] > cached[2] and cached[2] <= before
    assert first.choices[0].message.content == again.choices[0].message.content
    before = engine.stats()["encoded_tokens"]
    client.chat.completions.create(messages=said("another question ", picture(7)), **GREEDY)
    assert engine.stats()["encoded_tokens"] == before, "it was encoded again"


def test_turns_with_images_in_responses(client, stock):
    def asked(*parts):
        kinds = [
            {"type": "input_text", "text": part} if isinstance(part, str) else {"type": "input_image", "image_url": data_url(part)}
            for part in parts
        ]
        return [{"role": "user", "content": kinds}]

    options = dict(model=MODEL, temperature=0, max_output_tokens=8, extra_body={"ignore_eos": True})
    first = client.responses.create(input=asked("what is ", picture(1), "?"), **options)
    text, count = stock("what is ", picture(1), "?")
    assert (first.output_text, first.usage.input_tokens) == (text, count)
    events = list(client.responses.create(input=asked("what is ", picture(1), "?"), stream=True, **options))
    assert events[-1].response.output_text == text
    second = client.responses.create(input=asked(picture(2), "and this?"), previous_response_id=first.id, **options)
    assert second.usage.input_tokens > count
    (kept,) = client.responses.input_items.list(first.id).data
    assert [part.type for part in kept.content] == ["input_text", "input_image", "input_text"]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(input=asked("x", b"no image"), previous_response_id=first.id, **options)
    assert refusal.value.param == "input.0.content.1.image_url"


def test_tokenize_counts_images(url, stock):
    body = {"messages": said("what is ", picture(1), "?")}
    answer = httpx.post(f"{url}/tokenize", json=body).json()
    assert answer["count"] == len(answer["tokens"]) == stock("what is ", picture(1), "?")[1]


def refused(client, *parts, **options) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(messages=said(*parts), **GREEDY, **options)
    return refusal.value


def test_bad_images_are_refused_by_their_names(client, pictures):
    good = picture(1)
    first, second = (f"messages.0.content.{place}.image_url" for place in (0, 1))
    assert refused(client, good, b"not an image").param == second
    assert refused(client, good[: len(good) // 2]).param == first
    assert refused(client, picture(1, 200, 200)).param == first  # pixels
    assert refused(client, *[good] * 4).param == "messages.0.content.3.image_url"
    assert refused(client, good, bytes(50_000)).param == second
    assert refused(client, f"http://{pictures}/2.png").param == first
    assert refused(client, "http://example.org/2.png").code == "not_allowed"
    assert refused(client, good, "a <image> or <|image_pad|> of the user's own").param == "messages"
    bomb = io.BytesIO()
    Image.new("1", (16_000, 16_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 50_000
    assert "pixels" in refused(client, bomb.getvalue()).message


def test_bad_images_harm_nobody_beside_them(url, stock):
    parts = ["what is ", picture(1), "?"]
    expected = stock(*parts)[0]

    async def ask(client, *asked):
        try:
            answer = await client.chat.completions.create(messages=said(*asked), **GREEDY)
        except openai.BadRequestError as error:
            return error.param
        return answer.choices[0].message.content

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            asked = [[*parts] if place % 2 else ["x", picture(place)[:100]] for place in range(12)]
            return await asyncio.gather(*(ask(client, *one) for one in asked))

    assert asyncio.run(all_at_once()) == ["messages.0.content.1.image_url", expected] * 6


def test_images_are_the_users(client):
    messages = [{"role": "assistant", "content": said(picture(1))[0]["content"]}, *said("x")]
    with pytest.raises(openai.BadRequestError, match="the user's") as refusal:
        client.chat.completions.create(messages=messages, **GREEDY)
    assert refusal.value.param == "messages.0.content.0.image_url"
    content = said("x", picture(1))[0]["content"]
    content[1]["image_url"]["detail"] = "low"
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(messages=[{"role": "user", "content": content}], **GREEDY)
    assert refusal.value.param == "messages.0.content.1.image_url.detail"


@pytest.mark.filterwarnings(*WARNINGS)
def test_adapters_beside_images(tmp_path, engine, client, label):
    """One that would change what the encoder sees is refused as the model that it is to a client."""
    peft = pytest.importorskip("peft")
    targets = {"language": r".*language_model.*\.(q_proj|down_proj)", "all": r".*(q_proj|visual.*qkv)"}
    for name, modules in targets.items():
        tuned = peft.get_peft_model(tiny_pair(label)[0], peft.LoraConfig(r=4, target_modules=modules))
        shake(tuned)
        tuned.save_pretrained(tmp_path / name)
        engine.load_adapter(name, str(tmp_path / name))
    asked = dict(GREEDY, messages=said("what is ", picture(1), "?"))
    plain, tuned = (client.chat.completions.create(**asked | {"model": name}) for name in (MODEL, "language"))
    assert plain.choices[0].message.content != tuned.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="'all' changes more") as refusal:
        client.chat.completions.create(**asked | {"model": "all"})
    assert refusal.value.param == "model"
    assert client.chat.completions.create(**GREEDY | {"model": "all"}, messages=said("x")).choices


# -- from a folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, processor, _ = tiny_pair("llava")
    folder = tmp_path_factory.mktemp("vision")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_the_command_line_sees_a_file(folder, tmp_path):
    model, processor, _ = tiny_pair("llava")
    file = tmp_path / "picture.png"
    file.write_bytes(picture(1))
    command = ["generate", str(folder), "--image", str(file), "--device", "cpu", "--chat", "-p", "what is it?"]
    done = CliRunner().invoke(app, [*command, "--max-tokens", "8", "--json", "-q"], catch_exceptions=False)
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.open(file)], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert json.loads(done.stdout)["text"] == expected


def test_a_processor_is_loaded_with_its_template(folder):
    model, tokenizer = load_model(str(folder), device="cpu", progress=False)
    processor = load_processor(str(folder), model, tokenizer)
    assert processor.tokenizer is tokenizer and tokenizer.chat_template == processor.chat_template
    assert tokenizer.padding_side == "left"


def test_without_a_processor_a_model_is_served_for_text(tmp_path):
    model = tiny_model("qwen2_vl", text_config=dict(MROPE, vocab_size=320))
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded, tokenizer = load_model(str(tmp_path), device="cpu", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_processor(str(tmp_path), loaded, tokenizer) is None
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    with serving(create_app(Engine(loaded, tokenizer), Settings(model_name=MODEL))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=8)
        assert answer.choices[0].message.content == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
        refusal = refused(client, "x", picture(1))
        assert refusal.param == "messages.0.content.1.image_url" and "takes no images" in refusal.message
        with pytest.raises(openai.BadRequestError, match="takes no images") as refusal:
            content = [{"type": "input_image", "image_url": data_url(picture(1))}]
            client.responses.create(model=MODEL, input=[{"role": "user", "content": content}])
        assert refusal.value.param == "input.0.content.0.image_url"


def test_a_processor_that_cannot_be_loaded_is_warned_of(tmp_path):
    model = tiny_model("qwen2_vl", text_config=dict(MROPE, vocab_size=320))
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.warns(UserWarning, match="images are not taken"):
        assert load_processor(str(tmp_path), model, make_tokenizer()) is None
