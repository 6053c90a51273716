"""Images, and other things a request brings along, that have brought servers like this one down. Each is refused by name;
meanwhile another client gets its right answer about a picture of its own, and afterwards nothing of it is left."""

from __future__ import annotations

import contextlib
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import torch
from abuse_parts import others_unharmed, post, refused, served, text_of
from pictures import data_url, encoded, picture
from PIL import Image, PngImagePlugin
from tiny_processors import tiny_pair

from hf_paged import Engine, EngineConfig, ImageLimits
from hf_paged.integrations.openai import Settings

MODEL, CHAT = "vision", "/v1/chat/completions"


def asked(*parts: str | bytes, **more) -> dict:
    """A chat about texts and pictures, these as files or URLs that are marked by what they begin with."""
    content = []
    for part in parts:
        if isinstance(part, str) and not part.startswith(("data:", "http")):
            content.append({"type": "text", "text": part})
        else:
            url = part if isinstance(part, str) else data_url(part)
            content.append({"type": "image_url", "image_url": {"url": url}})
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    return body | more


@contextlib.contextmanager
def http_server():
    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self):
            moved = self.path == "/moved"
            self.send_response(302 if moved else 200)
            self.send_header(*(("Location", "/1.png") if moved else ("Content-Type", "image/png")))
            self.end_headers()
            self.wfile.write(b"" if moved else encoded(picture(1)))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def listed():
    """The port of a host that is on the list by its address."""
    with http_server() as port:
        yield port


@pytest.fixture(scope="module")
def named():
    """The port of a host that is on the list by a name, which is at a private address."""
    with http_server() as port:
        yield port


@pytest.fixture(scope="module")
def engine():
    model, processor, _ = tiny_pair("llava")
    limits = ImageLimits(max_count=4, max_pixels=1_000_000, max_total_pixels=1_500_000)
    return Engine(model, processor, EngineConfig(max_num_seqs=16, max_batch_tokens=64, images=limits, block_size=16))


@pytest.fixture(scope="module")
def address(engine, listed, named):
    hosts = (f"127.0.0.1:{listed}", f"localhost:{named}")
    with served(engine, Settings(model_name=MODEL, allowed_media_hosts=hosts)) as address:
        yield address


@pytest.fixture(scope="module")
def expected() -> str:
    model, processor, _ = tiny_pair("llava")
    content = [{"type": "text", "text": "what is "}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[picture(1)], return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(autouse=True)
def unharmed(address, engine, expected):
    with others_unharmed(address, engine, CHAT, asked("what is ", encoded(picture(1))), expected):
        yield


@pytest.fixture
def client(address):
    with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", timeout=60) as client:
        yield client


def png(width: int, height: int, *more: tuple[bytes, bytes], pixels: bytes = b"") -> bytes:
    """A file that says it has so many pixels, and has those that are given."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *more, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")
    pack = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + b"".join(pack(*chunk) for chunk in chunks)


def damaged() -> bytes:
    data = bytearray(encoded(picture(1, 99, 99)))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def with_texts(count: int) -> bytes:
    """Of a few bytes that become a MiB each."""
    texts = PngImagePlugin.PngInfo()
    for place in range(count):
        texts.add_text(f"text {place}", "x" * 2**20, zip=True)
    return encoded(picture(1), pnginfo=texts)


def large_frame() -> bytes:
    """A GIF of one pixel, whose only frame says it is larger."""
    data = bytearray(encoded(Image.new("P", (1, 1)), "GIF"))
    frame = data.rindex(b",", 0, len(data) - 8)
    data[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)
    return bytes(data)


MOVING = dict(save_all=True, append_images=[picture(2)])
IMAGES = {  # what is sent, and what is said of it
    "no image": (b"hello", "cannot be decoded"),
    "damaged": (damaged, "cannot be decoded"),
    "truncated": (lambda: encoded(picture(1, 99, 99))[:5000], "cannot be decoded"),
    "truncated JPEG": (lambda: encoded(picture(1, 99, 99), "JPEG")[:900], "cannot be decoded"),
    "a header only": (lambda: encoded(picture(1))[:33], "cannot be decoded"),
    "no data": ("data:image/png;base64,", "empty"),
    "3.6 billion pixels": (png(60_000, 60_000), "image_url"),
    "2 million": (png(2000, 1000), "2000 x 1000 pixels"),
    "a negative size": (png(2**32 - 1, 2**32 - 1), "image_url"),
    "no pixels": (png(0, 5), "image_url"),
    "a packed bomb": (lambda: encoded(Image.new("1", (16_000, 16_000))), "pixels"),
    "more data than pixels": (png(8, 8, pixels=bytes(64 * 2**20)), None),  # what is too much is left unread
    "texts that unpack": (with_texts(90), "cannot be decoded"),
    "a line": (lambda: encoded(Image.new("L", (1, 65_000))), "one side is more than 200 times the other"),
    "a line across": (lambda: encoded(Image.new("L", (65_000, 1)), "JPEG"), "one side is more than 200 times"),
    "a frame beyond its picture": (large_frame, "image_url"),
    "an animated GIF": (lambda: encoded(picture(1), "GIF", **MOVING), "animated"),
    "an animated PNG": (lambda: encoded(picture(1), "PNG", **MOVING), "animated"),
    "an animated WebP": (lambda: encoded(picture(1), "WEBP", **MOVING), "animated"),
    "TIFF that says PNG": (lambda: encoded(picture(1), "TIFF"), "cannot be decoded"),
    "PostScript that says PNG": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
    "PDF that says PNG": (lambda: encoded(picture(1), "PDF"), "cannot be decoded"),
    "drawings": (data_url(b"<svg/>", "image/svg+xml"), "svg"),
    "a page": (data_url(b"<html>", "text/html"), "text/html"),
    "no type": (data_url(encoded(picture(1)), ""), "type is not told"),
    "no base64": ("data:image/png,abcd", "must look like"),
    "wrong base64": (data_url(encoded(picture(1)))[:-5] + "*****", "not base64"),
    "a file of the server's": ("data:file:///etc/passwd", "must look like"),
    "a host off the list": ("http://example.org/a.png", "fetches no images from example.org"),
    "a private address": ("http://169.254.169.254/latest/meta-data", "fetches no images from 169.254.169.254"),
    "this machine": ("http://127.0.0.1:{named}/1.png", "fetches no images from 127.0.0.1"),
    "this machine in octal": ("http://0177.0.0.1:{named}/1.png", "it is no URL"),
    "this machine as a number": ("http://2130706433:{named}/1.png", "fetches no images from"),
    "a backslash": ("http://127.0.0.1:{listed}\\@example.org/1.png", "image_url"),
    "a user": ("http://127.0.0.1:{listed}@example.org/1.png", "image_url"),
    "a name at a private address": ("http://localhost:{named}/1.png", "its host is at an address"),
    "a redirect": ("http://127.0.0.1:{listed}/moved", "redirects (302)"),
    "another scheme": ("httpx://127.0.0.1/1.png", "neither a data: URL"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMAGES)
def test_a_bad_image_is_refused_by_its_place(client, listed, named, case):
    given, said = IMAGES[case]
    given = given() if callable(given) else given
    if isinstance(given, str):
        given = given.replace("{listed}", str(listed)).replace("{named}", str(named))
    answer = post(client, CHAT, asked("what is ", encoded(picture(2)), given))
    if said is None:
        assert answer.status_code == 200
        return
    refused(answer, said)
    assert answer.json()["error"]["param"] == "messages.0.content.2.image_url"


def test_good_images_of_all_ways_to_send_them(client, listed, expected):
    sent = [encoded(picture(1)), encoded(picture(1), "BMP"), encoded(picture(1), "WEBP", lossless=True)]
    for image in [*sent, f"http://127.0.0.1:{listed}/1.png"]:
        assert text_of(post(client, CHAT, asked("what is ", image))) == expected


SMALL = data_url(encoded(picture(3, 4, 4)))
PLACES = {
    "too many": (asked(*[SMALL] * 5), "messages.0.content.4.image_url"),
    "a thousand": (asked(*[SMALL] * 1000), "messages.0.content.4.image_url"),
    "together too large": (asked(*[encoded(Image.new("L", (900, 900)))] * 2), "messages.0.content.1.image_url"),
    "a placeholder without an image": (asked("what is <image> here?"), "messages"),
    "a placeholder beside an image": (asked("what is <image> beside ", SMALL), "messages"),
    "more tokens than fit": (asked("word " * 900, SMALL), "max_tokens"),
    "the processor's own outputs": (asked("x", SMALL, pixel_values=[[1.0]]), "pixel_values"),
    "embeddings of its own": (asked("x", prompt_embeds="AAAA"), "prompt_embeds"),
    "hashes of its own": (asked("x", SMALL, mm_hashes=["forged"]), "mm_hashes"),
    "an adapter that is not here": (asked("x", SMALL, model="nobody"), "model"),
    "options of the processor's": (asked("x", SMALL, mm_processor_kwargs={"size": 10**6}), "mm_processor_kwargs"),
}
PARTS = {
    "no URL": {"type": "image_url", "image_url": {}},
    "a URL that is none": {"type": "image_url", "image_url": {"url": 5}},
    "a URL alone": {"type": "image_url", "image_url": SMALL},
    "a path": {"type": "image_url", "image_url": {"url": "/etc/passwd"}},
    "a video": {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AAAA,AAAA"}},
    "a sound": {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    "embeddings": {"type": "image_embeds", "image_embeds": "AAAA"},
}


@pytest.mark.parametrize("case", [*PLACES, *PARTS])
def test_what_goes_with_no_prompt_is_refused_by_name(client, case):
    if case in PARTS:
        body, place = asked("x"), "messages.0.content.1"
        body["messages"][0]["content"].append(PARTS[case])
    else:
        body, place = PLACES[case]
    answer = post(client, CHAT, body)
    assert answer.status_code == (404 if place == "model" else 400), answer.text
    assert answer.json()["error"]["param"].startswith(place), answer.text


def test_an_image_is_found_by_no_other_s_salt_and_no_other_image(client):
    def cached(seed: int, salt: str | None) -> int:
        body = asked("a question about ", encoded(picture(seed)), "word by word " * 4, cache_salt=salt)
        return post(client, CHAT, body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(7, "hers") == 0 and cached(7, "hers") > 32
    for forged in (None, "hers\0", "Hers", "her"):
        assert cached(7, forged) == 0, forged
    assert cached(8, "hers") <= 32 < cached(7, "hers")


def test_bad_images_by_the_dozen_at_once(client, engine, address):
    """Beside good ones that come in between."""
    kinds = [png(900, 900), damaged(), encoded(picture(2))]
    body = [asked(f"number {place}: ", kinds[place % 3]) for place in range(24)]
    statuses = [None] * len(body)

    def ask(place: int) -> None:
        with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", timeout=60) as own:
            statuses[place] = post(own, CHAT, body[place]).status_code

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(body))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [400, 400, 200] * 8


def test_an_image_that_the_encoder_fails_on_ends_its_own_request(client, engine, monkeypatch):
    kind = type(engine.model.module.model)
    encode, bad = kind.get_image_features, encoded(picture(9))
    inputs = tiny_pair("llava")[1](text=["<image>"], images=[picture(9)], return_tensors="pt")

    def failing(self, pixel_values, **options):
        if any(torch.equal(one, inputs["pixel_values"][0]) for one in pixel_values):
            raise RuntimeError("a kernel that does not like this picture")
        return encode(self, pixel_values=pixel_values, **options)

    monkeypatch.setattr(kind, "get_image_features", failing)
    answer = post(client, CHAT, asked("what is ", bad))
    assert answer.status_code == 500 and "error" in answer.json()
