"""Images in an engine: prompts as users write them, limits, faults that stay local, and what is shared between requests."""

from __future__ import annotations

import asyncio
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures import encoded, picture
from PIL import Image
from tiny_models import tiny_model
from tiny_processors import available, tiny_pair

import hf_paged
from hf_paged import (
    AsyncEngine,
    Engine,
    EngineConfig,
    ImageLimits,
    InvalidArgument,
    QueueFull,
    SamplingParams,
    ScoreParams,
    UnsupportedOption,
)

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LABELS = available()


@pytest.fixture(scope="module")
def llava():
    return tiny_pair("llava")


@pytest.fixture
def engine(llava):
    model, processor, _ = llava
    with Engine(model, processor, EngineConfig(max_batch_tokens=24)) as engine:
        yield engine


def stock(model, processor, text: str, images: list, **options) -> list[int]:
    """Tokens of transformers' own `generate`, by the processor as its users call it."""
    hf_paged.unpatch(model) if hf_paged.hf.patch.is_patched(model) else None
    inputs = processor(text=[text], images=images or None, return_tensors="pt", **options)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def tokens(engine, prompt, images=None, params=GREEDY, **options) -> list[int]:
    state = engine.submit(prompt, params, images=images, **options)
    while not state.finished:
        engine.step()
    state.raise_error()
    return state.output.outputs[0].token_ids


# -- prompts


@pytest.mark.parametrize("label", LABELS)
def test_text_and_chats_with_images_have_stocks_tokens(label):
    model, processor, shown = tiny_pair(label)
    text = f"one {shown} two {shown} three"
    images = [picture(1), picture(2, 31, 9)]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}, {"type": "image"}]},
    ]
    in_parts = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [dict(chat[1]["content"][0], image=images[0]), chat[1]["content"][1],
                                     dict(chat[1]["content"][2], image=images[1])]},
    ]  # fmt: skip
    rendered = processor.apply_chat_template(in_parts, add_generation_prompt=True, tokenize=False)
    expected = [stock(model, processor, text, images), stock(model, processor, rendered, images)]
    with Engine(model, processor, EngineConfig(max_batch_tokens=24)) as engine:
        given = [engine.add(text, GREEDY, images=images), engine.add(chat, GREEDY, images=images)]
        given += [engine.add(in_parts, GREEDY), engine.add(text, GREEDY, images=list(map(encoded, images)))]
        made = processor(text=[text], images=images, return_tensors="pt")
        given.append(engine.add(made["input_ids"][0].tolist(), GREEDY, images=made))
        found = {}
        while engine.has_unfinished():
            for output in engine.step():
                found[output.request_id] = output
    assert [found[name].outputs[0].token_ids for name in given] == [expected[i] for i in (0, 1, 1, 0, 0)]
    assert found[given[0]].prompt == text and found[given[1]].prompt == rendered


def test_text_alone_needs_no_images(engine, llava):
    model, processor, _ = llava
    chat = [{"role": "user", "content": "Hello"}]
    assert tokens(engine, "just text") and tokens(engine, chat)
    one = engine.submit(chat, GREEDY).output.prompt
    assert one == "user:Helloassistant:"


def test_arrays_are_taken_as_the_processor_takes_them(llava):
    model, processor, shown = llava
    array = np.array(picture(5))
    expected = stock(model, processor, f"a{shown}", [array])
    with Engine(model, processor) as engine:
        assert tokens(engine, f"a{shown}", [array]) == expected
        assert tokens(engine, f"a{shown}", [torch.from_numpy(array)]) == expected


def test_photographs_are_turned_upright(llava):
    model, processor, shown = llava
    image = picture(6)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    expected = stock(model, processor, f"a{shown}", [image.rotate(-90, expand=True)])
    with Engine(model, processor) as engine:
        assert tokens(engine, f"a{shown}", [encoded(image, exif=exif)]) == expected


# -- what is shared


def test_the_same_image_is_encoded_once_and_found_in_the_prefix_cache(engine):
    text = "look <image> " + "and tell me what it is, in one word or two " * 2
    first = tokens(engine, text, [picture(1)])
    assert engine.stats()["encoded_tokens"] == 4
    engine.reset_stats()
    assert tokens(engine, text, [picture(1)]) == first
    assert engine.stats()["prefix_hit_tokens"] >= 64 and engine.stats()["encoded_tokens"] == 0
    assert tokens(engine, "other words " + text, [picture(1)])
    assert engine.stats()["encoded_tokens"] == 0 and engine.stats()["encoder_cache_bytes"] > 0


def test_another_image_at_the_same_place_is_another_prompt(engine, llava):
    model, processor, shown = llava
    text = f"a long beginning, the same for all: {shown} what is it?"
    answers = [tokens(engine, text, [picture(seed)]) for seed in (1, 2, 1, 3)]
    assert answers[0] == answers[2] and answers[0] != answers[1] != answers[3]
    engine.close()
    assert answers == [stock(model, processor, text, [picture(seed)]) for seed in (1, 2, 1, 3)]


def test_other_weights_of_the_encoder_forget_what_it_gave(engine, llava):
    model, _, shown = llava
    text, image = f"a{shown}b", [picture(1)]
    before = tokens(engine, text, image)
    weight = model.model.multi_modal_projector.linear_2.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-1.5)
    try:
        changed = tokens(engine, text, image)
        assert changed != before
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert tokens(engine, text, image) == before


def test_little_memory_for_embeddings_costs_time_only(llava):
    model, processor, shown = llava
    text = f"{shown} " + "x" * 30 + f" {shown}{shown}" + "y" * 30
    images = [picture(seed) for seed in (1, 2, 3)]
    expected = stock(model, processor, text, images)
    limits = ImageLimits(cache_memory=1, tokens_per_step=1)
    with Engine(model, processor, EngineConfig(max_batch_tokens=17, images=limits)) as engine:
        states = [engine.submit(text, GREEDY, images=images) for _ in range(3)]
        while engine.has_unfinished():
            before = engine.stats()["encoded_tokens"]
            engine.step()
            assert engine.stats()["encoded_tokens"] - before <= 8  # an image begun, and one to go on with
        assert [state.output.outputs[0].token_ids for state in states] == [expected] * 3
        assert engine.stats()["encoder_cache_bytes"] == 0


def test_preemption_forks_guesses_and_neighbours(llava):
    model, processor, shown = llava
    texts = [f"{'ab' * (3 * i)} {shown} what? {shown}" for i in range(6)]
    images = [[picture(i), picture(i + 1)] for i in range(6)]
    expected = [stock(model, processor, *pair) for pair in zip(texts, images)]
    for options in (dict(kv_cache_memory=60_000), dict(speculation="ngram"), dict(overlap=True), dict(block_size=32)):
        with Engine(model, processor, EngineConfig(max_batch_tokens=24, **options)) as engine:
            params = SamplingParams(temperature=0, max_tokens=8, n=2, ignore_eos=True)
            states = [engine.submit(text, params, images=of) for text, of in zip(texts, images)]
            states.append(engine.submit("no image at all", params))
            while engine.has_unfinished():
                engine.step()
            engine.check_integrity()
            for state, own in zip(states, expected):
                assert [output.token_ids for output in state.output.outputs] == [own, own]
            assert "kv_cache_memory" not in options or engine.stats()["preemptions"]


# -- tasks


def test_embeddings_and_scores_of_prompts_with_images(engine, llava):
    model, processor, shown = llava
    text, image = f"a {shown} b", [picture(4)]
    embedded = engine.embed(text, pooling="last", normalize=False, images=image)[0]
    scored = engine.submit(text, ScoreParams(continuation=(70, 71)), images=image)
    while engine.has_unfinished():
        engine.step()
    lists = engine.score([text, "no image"], [[(70, 71), (70, 72)], [(70,)]], images=[image, None])
    assert lists[0][0].token_logprobs == scored.output.result.token_logprobs and len(lists[1]) == 1
    with pytest.raises(InvalidArgument, match="images must be a list with those of each prompt, got 1 for 2"):
        engine.embed([text, text], images=[image])
    outputs = engine.generate(["no image", text], GREEDY, images=[None, image])
    assert outputs[1].outputs[0].token_ids == tokens(engine, text, image)
    engine.close()
    inputs = processor(text=[text], images=image, return_tensors="pt")
    ids = torch.cat([inputs["input_ids"], torch.tensor([[70, 71]])], -1)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=inputs["pixel_values"], output_hidden_states=True)
    size = inputs["input_ids"].shape[1]
    torch.testing.assert_close(
        torch.as_tensor(embedded.embedding), out.hidden_states[-1][0, size - 1], rtol=1e-4, atol=1e-4
    )
    wanted = out.logits[0].log_softmax(-1)[[size - 1, size], [70, 71]]
    torch.testing.assert_close(torch.as_tensor(scored.output.result.token_logprobs), wanted, rtol=1e-4, atol=1e-4)


# -- asyncio


def test_in_asyncio(llava):
    model, processor, shown = llava
    expected = stock(model, processor, f"a{shown}", [picture(1)])

    async def run():
        async with AsyncEngine(Engine(model, processor)) as engine:
            good = engine.complete(f"a{shown}", GREEDY, images=[encoded(picture(1))])
            bad = engine.complete(f"a{shown}", GREEDY, images=[b"no image"])
            good, bad = await asyncio.gather(good, bad, return_exceptions=True)
            assert good.outputs[0].token_ids == expected
            assert isinstance(bad, InvalidArgument) and "images[0] cannot be decoded" in str(bad)

    asyncio.run(run())


# -- what is refused


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels."""
    chunk = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def animation() -> bytes:
    return encoded(picture(1), "GIF", save_all=True, append_images=[picture(2)])


BAD = {
    "no image": (b"hello", "cannot be decoded"),
    "empty": (b"", "cannot be decoded"),
    "cut off": (lambda: encoded(picture(1, 300, 300))[:5000], "cannot be decoded"),
    "bomb": (bomb(6000, 6000), "36000000|6000 x 6000 pixels, more than max_pixels"),
    "huge bomb": (bomb(60000, 60000), "cannot be decoded|pixels"),
    "a line": (lambda: encoded(Image.new("L", (1, 1000))), r"1 x 1000 pixels, and one side is more than 200 times"),
    "a line, opened": (Image.new("L", (1000, 1)), "max_aspect"),
    "a line of an array": (np.zeros((1, 1000, 3), np.uint8), "max_aspect"),
    "animated": (animation, "animated"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
    "text": ("a path.png", "must be a PIL image"),
    "flat array": (np.zeros(7), "must be a PIL image"),
    "empty array": (np.zeros((0, 4, 3)), "must be a PIL image"),
    "large array": (np.broadcast_to(np.uint8(0), (6000, 6000, 3)), "max_pixels"),
    "nothing": (None, "must be a PIL image"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_refused_by_its_place_and_harms_nobody(engine, llava, name):
    _, _, shown = llava
    bad, message = BAD[name]
    good = engine.submit(f"a{shown}", GREEDY, images=[picture(1)])
    with pytest.raises(InvalidArgument, match=rf"images\[1\].*({message})"):
        engine.add(f"a{shown}{shown}", GREEDY, images=[picture(1), bad() if callable(bad) else bad])
    while engine.has_unfinished():
        engine.step()
    assert not good.output.error and len(good.output.outputs[0].token_ids) == 8


def test_limits(llava):
    model, processor, shown = llava
    limits = ImageLimits(max_count=2, max_pixels=300, max_total_pixels=500, max_bytes="1KiB")
    with Engine(model, processor, EngineConfig(images=limits)) as engine:
        for images, message in (
            ([picture(1)] * 3, "images: 3 of them exceed max_count"),
            ([picture(1, 20, 20)], r"images\[0\] has 20 x 20 pixels, more than max_pixels \(300\)"),
            ([picture(1), encoded(picture(1, 14, 20))], r"images\[1\]: with it .* 520 pixels, .*max_total_pixels \(500\)"),
            ([encoded(picture(1, 30, 30))], r"images\[0\] has \d+ bytes, more than max_bytes \(1024\)"),
        ):
            with pytest.raises(InvalidArgument, match=message):
                engine.add("a" + shown * len(images), GREEDY, images=images)
        made = processor(text=["a" + shown * 3], images=[picture(1)] * 3, return_tensors="pt")
    with pytest.raises(InvalidArgument, match="max_pixels"):
        ImageLimits(max_pixels=0)
    with pytest.raises(InvalidArgument, match="max_aspect"):
        ImageLimits(max_aspect=1.5)
    with pytest.raises(InvalidArgument, match="max_bytes"):
        ImageLimits(max_bytes="many")
    with pytest.raises(InvalidArgument, match="ImageLimits"):
        EngineConfig(images=3)
    assert made


def test_images_of_many_requests_take_no_more_than_their_share(llava):
    model, processor, shown = llava
    inputs = processor(text=[f"a{shown}"], images=[picture(1)], return_tensors="pt")
    limits = ImageLimits(queue_memory=2 * inputs["pixel_values"].nbytes)
    texts, images = [f"a{shown}{seed}" for seed in range(5)], [[picture(seed)] for seed in range(5)]
    expected = [stock(model, processor, text, own) for text, own in zip(texts, images)]
    with Engine(model, processor, EngineConfig(images=limits, block_size=16)) as engine:
        first = [engine.submit(text, GREEDY, images=own) for text, own in zip(texts[:2], images)]
        again = engine.submit(engine.fork(first[0].request.request_id), GREEDY)  # its images are there already
        with pytest.raises(QueueFull, match="images of other requests"):
            engine.add(texts[2], GREEDY, images=images[2])
        engine.add("no image", GREEDY)
        engine.abort(first[1].request.request_id)
        engine.step()
        first[1] = engine.submit(texts[1], GREEDY, images=images[1])  # the room of one that has ended
        while engine.has_unfinished():
            engine.step()
        assert [state.output.outputs[0].token_ids for state in first] == expected[:2] and not again.output.error
        outputs = engine.generate(texts, GREEDY, images=images)  # what has no room waits outside
        assert [output.outputs[0].token_ids for output in outputs] == expected
        too_many = shown * 3
        assert engine.generate([f"a{too_many}"], GREEDY, images=[[picture(1), picture(2), picture(3)]])  # alone
    with pytest.raises(InvalidArgument, match="queue_memory"):
        ImageLimits(queue_memory="much")


def test_prompts_that_do_not_go_with_their_images(engine, llava):
    _, processor, shown = llava
    made = processor(text=[f"a{shown}"], images=[picture(1)], return_tensors="pt")
    ids = made["input_ids"][0].tolist()
    cases = [
        (f"a{shown}", None, "placeholders"),
        (f"a{shown}{shown}", [picture(1)], "images"),
        ("a", [picture(1)], "images"),
        (f"a{shown}", picture(1), "must be a list"),
        (f"a{shown}", np.array(picture(1)), "must be a list"),
        (ids, [picture(1)], "processor's own outputs"),
        ([5, 6, *ids[2:]], dict(made, pixel_values_videos=1), "takes no 'pixel_values_videos'"),
        (ids + ids[-1:], dict(made, pixel_values=torch.zeros(3, 3, 8, 8)), "5 placeholder tokens for 3 images"),
        (ids, {"pixel_values": torch.zeros(3)}, "images"),
        (ids, {"pixel_values": made["pixel_values"] * float("nan")}, "no numbers"),
        (ids, {"input_ids": 1}, "no 'pixel_values'"),
        ([{"role": "user", "content": [{"type": "image"}]}], None, "1 image parts"),
        ([{"role": "user", "content": [{"type": "image"}]}], [picture(1)] * 2, "images"),
        ([{"role": "user", "content": [{"type": "image", "url": "http://x/y.png"}]}], None, "nothing is fetched"),
        ([{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}], None, "nothing is fetched"),
        ([{"role": "user", "content": [{"type": "image", "image": picture(1)}]}], [picture(1)], "all in"),
        ([{"role": "user", "content": [{"type": "video"}]}], None, "'video' is not supported"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], None, "'input_audio' is not supported"),
    ]
    for prompt, images, message in cases:
        with pytest.raises(InvalidArgument, match=message):
            engine.add(prompt, GREEDY, images=images)
    assert not engine.has_unfinished()


@pytest.mark.parametrize("label", LABELS)
def test_a_token_of_an_image_is_no_place_for_one(label):
    model, processor, shown = tiny_pair(label)
    token = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    with Engine(model, processor) as engine:
        with pytest.raises(InvalidArgument, match="images: .* places? .*<"):
            engine.add(f"a{shown} or {token}", GREEDY, images=[picture(1)])
        with pytest.raises(InvalidArgument, match="placeholders"):
            engine.add(f"a {token}", GREEDY)
        assert not engine.has_unfinished()


def test_models_and_engines_without_images(llava):
    model, processor, shown = llava
    with (
        Engine(tiny_model("llama"), None) as engine,
        pytest.raises(UnsupportedOption, match="LlamaForCausalLM takes none"),
    ):
        engine.add([5, 6], GREEDY, images={"pixel_values": torch.zeros(1, 3, 8, 8)})
    processor.tokenizer.chat_template = processor.chat_template
    with Engine(model, processor.tokenizer) as engine:
        for prompt in (f"a{shown}", [{"role": "user", "content": [{"type": "image"}]}]):
            with pytest.raises(InvalidArgument, match="no processor"):
                engine.add(prompt, GREEDY, images=[picture(1)])
        with pytest.raises(InvalidArgument, match="1 image parts"):
            engine.add([{"role": "user", "content": [{"type": "image"}]}], GREEDY)
        assert tokens(engine, [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
    processor.tokenizer.chat_template = None


def test_an_image_that_the_encoder_fails_on_ends_its_own_request(engine, llava, monkeypatch):
    model, processor, shown = llava
    text = f"a{shown}b"
    bad = processor(text=[text], images=[picture(9)], return_tensors="pt")["pixel_values"]
    encode = type(model.model).get_image_features

    def failing(self, pixel_values, **options):
        if any(torch.equal(one, bad[0]) for one in pixel_values):
            raise RuntimeError("a kernel that does not like this picture")
        return encode(self, pixel_values=pixel_values, **options)

    monkeypatch.setattr(type(model.model), "get_image_features", failing)
    states = [engine.submit(text, GREEDY, images=[picture(seed)]) for seed in (1, 9, 2)]
    made = processor(text=[text + shown], images=[picture(3)] * 2, return_tensors="pt")
    too_few = made["input_ids"][0].tolist()
    states.append(engine.submit(too_few, GREEDY, images={"pixel_values": made["pixel_values"][:1]}))
    while engine.has_unfinished():
        engine.step()
    assert "does not like this picture" in str(states[1].output.error)
    assert "4 embeddings for 8 tokens" in str(states[3].output.error)
    monkeypatch.undo()
    engine.close()
    expected = [stock(model, processor, text, [picture(seed)]) for seed in (1, 2)]
    assert [states[i].output.outputs[0].token_ids for i in (0, 2)] == expected


def test_hooks_of_a_request_are_on_what_its_tokens_run_through(engine, llava):
    model, processor, shown = llava
    seen = []
    name = "model.language_model.layers.1"
    tokens(engine, f"a{shown}", [picture(1)], hooks=engine.hooks((), (), {name: lambda x, at: seen.extend(at.tolist())}))
    assert sorted(set(seen)) == list(range(max(seen) + 1))
    for name in ("model.vision_tower", "model.multi_modal_projector.linear_1"):
        with pytest.raises(InvalidArgument, match="sees images"):
            engine.add("a", GREEDY, forward_hooks={name: print})
