"""`hf-paged run-batch`: every line answered as the server answers it, once, whatever happens on the way."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy
import pytest
from PIL import Image
from server_parts import MODEL, make_model, make_tokenizer
from tiny_processors import tiny_pair

from hf_paged.cli import main

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model of the `url` fixture as a checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def line(custom_id: str, url: str, **body) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def chat(custom_id: str, text: str, **body) -> dict:
    return line(custom_id, CHAT, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=6, **body)


def write(path: Path, lines: list) -> Path:
    texts = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def arguments(source, target, folder: Path) -> list[str]:
    return ["run-batch", str(source), str(target), str(folder), "--served-model-name", MODEL, "--device", "cpu"]


def run(source, target, folder: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as exit:
        main([*arguments(source, target, folder), "--quiet", *options])
    return exit.value.code


def results(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_bytes().splitlines()]


def essence(body: dict) -> dict:
    """An answer without what no two answers share."""
    return {name: value for name, value in body.items() if name not in ("id", "created", "created_at", "usage")}


def test_every_line_has_the_answer_of_the_server(url, folder, tmp_path):
    lines = [
        chat("greedy", "Tell me"),
        chat("several", "Tell me", n=2, logprobs=True, top_logprobs=2, seed=3),
        line("sampled", TEXT, model=MODEL, prompt=["Tell me", "the rain"], max_tokens=5, seed=7, temperature=0.8),
        line("scored", TEXT, prompt="Tell me", max_tokens=0, echo=True, logprobs=1),
        line("formed", TEXT, prompt="a", temperature=0, structured_outputs={"regex": "[a-f]{4}"}),
        line("tokens", "/tokenize", prompt="Tell me"),
        chat("unknown field", "Tell me", nonsense=1),
        chat("other model", "Tell me", model="other"),
        chat("Zürich ∞", "Zürich ∞"),
    ]
    out = tmp_path / "out.jsonl"
    assert run(write(tmp_path / "in.jsonl", lines), out, folder) == 1  # two of them are refused
    found = {result["custom_id"]: result for result in results(out)}
    assert len(found) == len(results(out)) == len(lines)
    for one in lines:
        result, over_http = found[one["custom_id"]], httpx.post(url + one["url"], json=one["body"], timeout=60)
        assert result["error"] is None and set(result) == {"id", "custom_id", "response", "error"}
        assert result["response"]["status_code"] == over_http.status_code
        assert essence(result["response"]["body"]) == essence(over_http.json())
        assert result["response"]["request_id"]
    assert found["unknown field"]["response"]["body"]["error"]["param"] == "nonsense"


def test_bad_lines_become_errors_with_their_numbers_and_harm_no_other(folder, tmp_path):
    good = [chat("first", "a"), chat("last", "b")]
    bad = {
        2: (b"{broken", "invalid_json_line", None),
        3: (b'"text"', "invalid_line", None),
        4: (b"\xff\xfe\xff", "invalid_json_line", None),
        5: (b"[" * 100_000, "invalid_json_line", None),
        7: (line("no such url", "/v1/nothing"), "invalid_url", "url"),
        8: (line("streamed", CHAT, messages=[], stream=True), "unsupported", "body.stream"),
        9: (chat("first", "again"), "duplicate_custom_id", "custom_id"),
        10: (chat("got", "a") | {"method": "GET"}, "invalid_line", "method"),
        11: ({"custom_id": "bare"}, "invalid_line", "method"),
        12: (chat("extra", "a") | {"priority": 1}, "invalid_line", "priority"),
        13: (chat("a" * 600, "a"), "invalid_line", "custom_id"),
        14: (b'{"custom_id": "long", "x": "' + b"a" * (17 * 2**20) + b'"}', "line_too_long", None),
    }
    lines = [good[0], *(bad[number][0] for number in (2, 3, 4, 5)), b"  ", *(bad[number][0] for number in range(7, 15)), good[1]]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert run(source, out, folder) == 1
    found = results(out)
    assert len(found) == len(lines) - 1
    errors = {result["error"]["line"]: result for result in found if result["error"]}
    assert {n: (e["error"]["code"], e["error"]["param"]) for n, e in errors.items()} == {n: b[1:] for n, b in bad.items()}
    assert all(result["response"] is None and f"line {n}" in result["error"]["message"] for n, result in errors.items())
    assert errors[7]["custom_id"] == "no such url" and errors[2]["custom_id"] is None
    assert CHAT in errors[7]["error"]["message"]
    good_ones = [result for result in found if not result["error"]]
    assert sorted(result["custom_id"] for result in good_ones) == ["first", "last"]
    assert all(result["response"]["status_code"] == 200 for result in good_ones)

    before = out.read_bytes()
    assert run(source, out, folder) == 1  # told again, and nothing is written twice
    assert out.read_bytes() == before
    lines[7 - 1] = chat("no such url", "mended")
    assert run(write(source, lines), out, folder) == 1
    assert out.read_bytes().startswith(before)
    [mended] = results(out)[len(found) :]
    assert mended["custom_id"] == "no such url" and mended["response"]["status_code"] == 200


def test_a_killed_run_goes_on_where_it_was(url, folder, tmp_path):
    lines = [chat(f"question {i}", f"question {i} of many", min_tokens=6) for i in range(120)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "hf_paged", *arguments(source, out, folder), "--max-concurrency", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not out.exists() or out.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    whole = [json.loads(text) for text in out.read_bytes().splitlines(keepends=True) if text.endswith(b"\n")]
    assert 3 <= len(whole) < len(lines)
    kept = out.read_bytes()[: out.read_bytes().rfind(b"\n") + 1]
    out.write_bytes(kept + json.dumps(whole[0]).encode()[:-40])  # as if killed while it wrote

    assert run(source, out, folder) == 0
    assert out.read_bytes().startswith(kept)
    found = {result["custom_id"]: result["response"]["body"]["choices"] for result in results(out)}
    assert len(results(out)) == len(found) == len(lines)
    for one in (lines[0], lines[60], lines[-1]):  # each has its own answer
        assert found[one["custom_id"]] == httpx.post(url + CHAT, json=one["body"], timeout=60).json()["choices"]


def test_lines_are_answered_as_they_come_and_an_interrupt_ends_it(folder):
    command = [sys.executable, "-m", "hf_paged", *arguments("-", "-", folder), "--quiet"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        for i in range(3):
            process.stdin.write(json.dumps(chat(f"line {i}", "Tell me")).encode() + b"\n")
            process.stdin.flush()
            result = json.loads(process.stdout.readline())  # before the next line is there
            assert result["custom_id"] == f"line {i}" and result["response"]["status_code"] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stdout.read() == b""
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("text", [b"notes\n", b"notes", b'{"id": "chatcmpl-1", "custom_id": "a"}\n', b"[]\n"])
def test_a_file_of_something_else_is_left_alone(folder, tmp_path, capsys, text):
    out = tmp_path / "out.jsonl"
    out.write_bytes(text)
    assert run(write(tmp_path / "in.jsonl", [chat("a", "a")]), out, folder) == 2
    assert "line 1: not a result of a batch" in capsys.readouterr().err
    assert out.read_bytes() == text


def test_results_of_other_requests_are_not_taken_for_these(folder, tmp_path, capsys):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    assert run(write(source, [chat("a", "one")]), out, folder) == 0
    before = out.read_bytes()
    assert run(write(source, [chat("a", "another")]), out, folder) == 2
    assert "another request with custom_id 'a'" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert run(source, source, folder) == 2
    assert "both the requests and their results" in capsys.readouterr().err
    assert run(tmp_path / "missing.jsonl", out, folder) == 2
    assert not os.path.exists(tmp_path / "missing.jsonl")


def test_images_come_from_hosts_that_are_listed(tmp_path):
    model, processor, _ = tiny_pair("llava")
    folder = tmp_path / "vision"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    image = Image.fromarray(numpy.random.default_rng(1).integers(0, 255, (12, 20, 3), dtype=numpy.uint8))
    data = io.BytesIO()
    image.save(data, "PNG")

    def about(custom_id: str, *urls: str) -> dict:
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": "what?"}]
        return line(custom_id, CHAT, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=6)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = f"http://127.0.0.1:{listener.getsockname()[1]}"
        inside = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        lines = [about("inside", inside), about("two", inside, inside), about("fetched", f"{here}/a"), about("not", "http://localhost/a")]
        head = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nConnection: close\r\n\r\n"

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.recv(10_000)
                connection.sendall(head + data.getvalue())

        thread = threading.Thread(target=answer)
        thread.start()
        out = tmp_path / "out.jsonl"
        hosts = ["--allowed-media-hosts", here.removeprefix("http://"), "--max-images", "1"]
        assert run(write(tmp_path / "in.jsonl", lines), out, folder, *hosts) == 1
        thread.join()
    found = {result["custom_id"]: result["response"] for result in results(out)}
    inputs = processor(text=["user:<image>what?assistant:"], images=[image], return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for name in ("inside", "fetched"):
        assert found[name]["body"]["choices"][0]["message"]["content"] == expected
    assert found["two"]["body"]["error"]["code"] == "too_many" and found["not"]["body"]["error"]["code"] == "not_allowed"
