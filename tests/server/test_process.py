"""`hf-paged serve` as a process: how it listens, how it ends, whom it does not wait for."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import ssl
import threading
import time

import httpx
import openai
import pytest
import trustme
from server_parts import MODEL, Running, make_model, make_tokenizer
from tiny_models import tiny_model

from hf_paged import Engine, InvalidArgument
from hf_paged.cli import main
from hf_paged.integrations.openai import Settings, create_app
from hf_paged.integrations.openai.serve import Process, Server, listening
from hf_paged.integrations.openai.tls import tls_context

KEY = "a-key-to-keep"
ENDLESS = {"model": MODEL, "prompt": "Tell me", "max_tokens": 30000, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=320, max_position_embeddings=32768).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def events(response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.read().decode().splitlines() if line]


def test_what_runs_ends_properly_and_nothing_new_begins(checkpoint):
    """The first request's body comes only when the server is stopping already, so that it stops for as long as we look."""
    with Running(checkpoint, "--api-key", KEY) as server:
        url = server.url()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        late = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        body = json.dumps(ENDLESS | {"max_tokens": 20}).encode()
        late.putrequest("POST", "/v1/completions")
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            late.putheader(name, value)
        late.endheaders(body[:10])
        while httpx.get(f"{url}/health").status_code != 200 or _open_requests(url, headers) < 1:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/ping").status_code == 503
        refused = httpx.post(f"{url}/v1/completions", json=ENDLESS, headers=headers)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "closed"
        assert refused.headers["Retry-After"] and refused.headers["Connection"] == "close"
        assert httpx.get(f"{url}/metrics", headers=headers).status_code == 200
        late.send(body[10:])
        told = events(late.getresponse())
        late.close()
        assert told[-1] == "[DONE]" and json.loads(told[-2])["choices"][0]["finish_reason"] == "length"
        assert server.ended() == 0
    messages = [line["message"] for line in server.lines]
    assert messages.index("listening") < messages.index("stopping") < messages.index("stopped")
    text = json.dumps(server.lines)
    assert "Tell me" not in text and KEY not in text and "cutting" not in text


def _open_requests(url: str, headers: dict) -> int:
    """Begun and not ended, but for the one that asks."""
    text = httpx.get(f"{url}/metrics", headers=headers).text
    [line] = [line for line in text.splitlines() if line.startswith("hf_paged:http_requests_open{")]
    return int(float(line.split()[-1])) - 1


def test_a_second_signal_cuts_off_what_runs_and_tells_it(checkpoint):
    with Running(checkpoint, HF_PAGED_GRACE="600") as server:
        with httpx.stream("POST", f"{server.url()}/v1/completions", json=ENDLESS, timeout=60) as response:
            lines = response.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"]
            server.process.send_signal(signal.SIGTERM)
            assert server.wait_for("stopping")["grace_s"] == 600
            server.process.send_signal(signal.SIGINT)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "closed"
        assert server.ended() == 1
    [asked] = [line for line in server.lines if line["logger"] == "hf_paged.access"]
    assert asked["error"] == "closed" and asked["status"] == 200 and asked["completion_tokens"] > 0


def test_a_chat_template_may_come_from_a_file_and_tells_the_formats(checkpoint, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ tools }}<tool_call>{'arguments': {}}<think></think>{{ messages[0].content }}", encoding="utf-8")
    with Running(checkpoint, "--chat-template", str(file), "--reasoning-parser", "none") as server:
        [model] = httpx.get(f"{server.url()}/v1/models").json()["data"]
        assert (model["tool_parser"], model["reasoning_parser"]) == ("hermes", None)
        [start] = [line for line in server.lines if line["message"] == "serving"]
        assert start["tool_parser"] == "hermes"


def test_what_is_wrong_shows_before_the_model_is_loaded(tmp_path, capsys):
    def said(*options: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["serve", str(tmp_path / "no-model"), *options])
        assert ended.value.code == 2
        return capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port: {port} at 127.0.0.1: Address already in use" in said("--port", str(port))
    assert "ssl_keyfile needs ssl_certfile" in said("--ssl-keyfile", "key.pem")
    assert "otlp_endpoint must be" in said("--otlp-endpoint", "localhost")
    assert "cors_origins" in said("--cors-origin", "example.org")
    assert "tool_parser must be one of auto, none, hermes" in said("--tool-parser", "json")
    assert "reasoning_parser must be one of auto, none, think" in said("--reasoning-parser", "deep")
    assert "missing.jinja" in said("--chat-template", str(tmp_path / "missing.jinja"))
    assert "no-model" in said("--port", "0")


# The same in this process


@contextlib.contextmanager
def serving(process: Process, settings: Settings = Settings(model_name=MODEL)):
    """Where `process` is served from a thread."""
    server = Server(create_app(Engine(make_model(), make_tokenizer()), settings), process)
    with listening(process) as listeners:
        thread = threading.Thread(target=server.run, args=(listeners,))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            server.port = None if listeners is None else listeners[0].getsockname()[1]
            yield server
        finally:
            server.should_exit = True
            thread.join()


def closed(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    connection.settimeout(20)
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            got += piece
    return got


def test_after_the_grace_what_runs_is_cut_off_and_told():
    with serving(Process(port=0, grace=0.1)) as server:
        body = ENDLESS | {"max_tokens": 400, "n": 8, "logprobs": 5, "temperature": 1}
        with httpx.stream("POST", f"http://127.0.0.1:{server.port}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.handle_exit(signal.SIGTERM, None)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "closed"
    assert server.was_cut


HALF = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "


def test_whoever_does_not_finish_a_request_is_not_waited_for():
    with serving(Process(port=0, header_timeout=0.4, keep_alive=0.4)) as server:
        port = server.port
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(6)]
        silent, half, dripping, once, again, idle = slow
        half.sendall(HALF)
        once.sendall(HALF + b"y\r\n\r\n")
        for late in (again, idle):
            late.sendall(HALF + b"y\r\n\r\n")
            assert late.recv(65536).startswith(b"HTTP/1.1 200 ")
        again.sendall(HALF)  # which by uvicorn alone would stop the clock of an idle connection
        stop = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                dripping.sendall(HALF)
                while not stop.wait(0.05):
                    dripping.sendall(b"y")

        dripper = threading.Thread(target=drip)
        dripper.start()
        assert closed(silent).startswith(b"HTTP/1.1 408 ")
        assert closed(half).startswith(b"HTTP/1.1 408 ")
        assert closed(dripping).startswith(b"HTTP/1.1 408 ")
        assert closed(again).startswith(b"HTTP/1.1 408 ")
        assert closed(once).startswith(b"HTTP/1.1 200 ")
        assert closed(idle) == b""  # only kept-alive: nothing to tell
        stop.set()
        dripper.join()
        for connection in slow:
            connection.close()
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_an_answer_may_take_longer_than_headers_and_bodies():
    with serving(Process(port=0, header_timeout=0.2), Settings(model_name=MODEL, body_timeout=0.2)) as server:
        port = server.port
        body = ENDLESS | {"max_tokens": 400, "n": 4, "logprobs": 5, "temperature": 1}
        started = time.monotonic()
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) as response:
            told = list(response.iter_lines())
        assert "[DONE]" in told[-2] + told[-1] and time.monotonic() - started > 0.2


def test_connections_are_bounded():
    with serving(Process(port=0, max_connections=2)) as server:
        port = server.port
        first, second = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
        second.sendall(HALF + b"y\r\n\r\n")
        assert second.recv(65536).startswith(b"HTTP/1.1 200 ")
        with socket.create_connection(("127.0.0.1", port)) as third:
            assert closed(third) == b""
        first.close(), second.close()
        while True:  # until the server has seen them go
            with contextlib.suppress(httpx.TransportError):
                assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
                break


def test_headers_are_bounded():
    with serving(Process(port=0)) as server:
        port = server.port
        with socket.create_connection(("127.0.0.1", port)) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(HALF + b"y" * 10**6)
            assert closed(connection)[:13] in (b"", b"HTTP/1.1 400 ")  # it is lost where the rest was still on its way
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_a_unix_socket(tmp_path):
    path = tmp_path / "socket"
    with serving(Process(uds=path, root_path="/llm"), Settings(model_name=MODEL, api_keys=(KEY,))):
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://any") as client:
            assert client.get("/health").status_code == 200  # the proxy took /llm off
            assert client.get("/v1/models").status_code == 401
            answer = client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"})
            assert answer.json()["data"][0]["id"] == MODEL


# TLS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A server's certificate and key, in files together and apart, the authority's, and a client's."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    ours, client = authority.issue_cert("localhost", "127.0.0.1"), authority.issue_cert("client@example.org")
    paths = {name: folder / f"{name}.pem" for name in ("cert", "key", "both", "ca", "client", "other", "none", "locked")}
    ours.cert_chain_pems[0].write_to_path(paths["cert"])
    ours.private_key_pem.write_to_path(paths["key"])
    ours.private_key_and_cert_chain_pem.write_to_path(paths["both"])
    authority.cert_pem.write_to_path(paths["ca"])
    client.private_key_and_cert_chain_pem.write_to_path(paths["client"])
    client.private_key_pem.write_to_path(paths["other"])
    paths["none"].write_text("nothing\n")
    from cryptography.hazmat.primitives import serialization as keys

    key = keys.load_pem_private_key(paths["key"].read_bytes(), None)
    form = keys.BestAvailableEncryption(b"open sesame")
    paths["locked"].write_bytes(key.private_bytes(keys.Encoding.PEM, keys.PrivateFormat.PKCS8, form))
    return paths


def trusting(files, client: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files["ca"])
    if client:
        context.load_cert_chain(files["client"])
    return context


@pytest.mark.parametrize("apart", [False, True])
def test_the_real_client_over_https(files, apart):
    own = {"ssl_certfile": files["cert"], "ssl_keyfile": files["locked"], "ssl_keyfile_password": "open sesame"}
    with serving(Process(port=0, **own if apart else {"ssl_certfile": files["both"]})) as server:
        port = server.port
        with httpx.Client(verify=trusting(files)) as http_client:
            client = openai.OpenAI(base_url=f"https://localhost:{port}/v1", api_key="x", http_client=http_client, max_retries=0)
            chunks = client.completions.create(model=MODEL, prompt="a", max_tokens=4, stream=True)
            assert list(chunks)[-1].choices[0].finish_reason
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.get(f"https://localhost:{port}/health")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://localhost:{port}/health")


def test_clients_may_need_a_certificate(files):
    with serving(Process(port=0, ssl_certfile=files["both"], ssl_ca_certs=files["ca"])) as server:
        port = server.port
        url = f"https://localhost:{port}/health"
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            httpx.get(url, verify=trusting(files))
        assert httpx.get(url, verify=trusting(files, client=True)).status_code == 200


@pytest.mark.parametrize(
    "options, message",
    [
        (("absent", None, None, None), "ssl_certfile: .*absent.*: No such file"),
        (("cert", "absent", None, None), "ssl_keyfile: .*absent.*: No such file"),
        (("both", None, None, "absent"), "ssl_ca_certs: .*absent.*: No such file"),
        (("none", "key", None, None), "ssl_certfile: no certificate in PEM in"),
        (("cert", None, None, None), "ssl_certfile: no private key in PEM can be read from"),
        (("cert", "none", None, None), "ssl_keyfile: no private key in PEM can be read from"),
        (("cert", "other", None, None), "ssl_keyfile: the key is not that of the certificate"),
        (("cert", "locked", None, None), "ssl_keyfile_password is needed"),
        (("cert", "locked", "guess", None), "ssl_keyfile_password is wrong"),
        (("both", None, None, "none"), "ssl_ca_certs: no certificates in PEM"),
    ],
    ids=str,
)
def test_a_wrong_file_is_named(files, tmp_path, options, message):
    cert, key, password, ca = options
    found = [None if name is None else files.get(name, tmp_path / name) for name in (cert, key, ca)]
    with pytest.raises(InvalidArgument, match=message):
        tls_context(found[0], found[1], password, found[2])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ssl_keyfile": "key"}, "ssl_keyfile needs ssl_certfile"),
        ({"log_format": "xml"}, "log_format must be one of text, json"),
        ({"log_level": "loud"}, "log_level must be one of"),
        ({"header_timeout": 0.0}, "header_timeout must be a positive"),
        ({"root_path": "llm/"}, "root_path must begin with /"),
        ({"grace": -1.0}, "grace must be"),
    ],
    ids=str,
)
def test_what_a_process_cannot_be_is_named(options, message):
    with pytest.raises(InvalidArgument, match=message):
        Process(**options)
    with pytest.raises(InvalidArgument, match="host: no.such.host.invalid"):
        with listening(Process(host="no.such.host.invalid")):
            pass
