"""Images that requests name, read from data URLs and from a real HTTP server on this machine."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trustme

from hf_paged.base.errors import InvalidArgument
from hf_paged.integrations.openai.errors import Refused
from hf_paged.integrations.openai.media import MediaReader
from hf_paged.integrations.openai.media_hosts import AllowedHosts, as_address

PNG = b"\x89PNG\r\n" + bytes(range(256)) * 16
MOST = 8 * len(PNG)
DATA = "data:image/png;base64," + base64.b64encode(PNG).decode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        getattr(self, self.path.split("?")[0].strip("/").replace(".", "_"))()

    def answer(self, status=200, body=PNG, kind="image/png", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def a_png(self):
        self.answer()

    def jpeg(self):
        self.answer(kind="Image/JPEG; charset=binary")

    def missing(self):
        self.answer(404)

    def moved(self):
        self.answer(302, b"", Location="/a.png")

    def page(self):
        self.answer(kind="text/html")

    def untyped(self):
        self.answer(kind=None)

    def zipped(self):
        self.answer(Content_Encoding="gzip")

    def empty(self):
        self.answer(body=b"")

    def large(self):
        self.answer(body=PNG * 10)

    def endless(self):
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(100_000):
            self.wfile.write(b"400\r\n" + b"x" * 1024 + b"\r\n")

    def cut(self):
        self.answer(Content_Length="100000")
        self.close_connection = True

    def slow(self):
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        while not self.server.over.wait(0.02):
            self.wfile.write(b"x")

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except ConnectionError:
            pass  # whoever asked has had enough


class Server(ThreadingHTTPServer):
    daemon_threads = False

    def handle_error(self, *_):
        pass  # a client that does not trust the certificate


@pytest.fixture
def server():
    with serve() as server:
        yield server


class serve:
    def __init__(self, tls=None):
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.asked, self.server.over = [], threading.Event()
        self.server.port = self.server.server_address[1]
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self.server

    def __exit__(self, *_):
        self.server.over.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def read(*urls, hosts=(), images=8, most=MOST, timeout=5.0):
    async def run():
        media = MediaReader(hosts, most_images=images, most_bytes=most, timeout=timeout)
        try:
            return await media.read([(f"images.{place}", url) for place, url in enumerate(urls)])
        finally:
            await media.close()

    return asyncio.run(run())


def refusal(*urls, **options) -> Refused:
    with pytest.raises(Refused) as refused:
        read(*urls, **options)
    assert refused.value.status == 400 and refused.value.message.startswith(f"{refused.value.param}: ")
    return refused.value


# -- data URLs


def test_a_data_url_is_its_data():
    assert read(DATA, DATA.replace("png", "JPEG"), DATA.replace("data:", "DATA:")) == [PNG] * 3
    assert read(DATA.replace("png;", "png;name=a.png;")) == [PNG]
    assert read() == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("data:image/png;base64,", "empty"),
        ("data:image/png,abcd", "must look like"),
        ("data:image/png;base64", "must look like"),
        ("data:", "must look like"),
        (DATA[:-1], "not base64"),
        (DATA[:60] + "-" + DATA[61:], "not base64"),
        (DATA[:60] + "\n" + DATA[60:], "not base64"),
        (DATA.replace("image/png", "text/html"), "text/html"),
        (DATA.replace("image/png", ""), "type is not told"),
        (DATA.replace("image/png", "image/svg+xml"), "svg"),
        ("file:///etc/passwd", "neither"),
        ("ftp://example.org/a.png", "neither"),
        ("/etc/passwd", "neither"),
        ("", "neither"),
    ],
)
def test_what_is_no_image_is_refused(given, says):
    assert says in refusal(given, hosts=["*"]).message


def test_too_many_bytes_are_refused_before_they_are_decoded(monkeypatch):
    assert read(DATA, most=len(PNG)) == [PNG]
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("it was decoded"))
    refused = refusal(DATA, most=len(PNG) - 1)
    assert (refused.param, refused.code) == ("images.0", "too_large")


def test_bytes_and_images_are_counted_over_the_whole_request(server):
    url = f"http://127.0.0.1:{server.port}"
    hosts = [f"127.0.0.1:{server.port}"]
    assert refusal(DATA, f"{url}/a.png", most=2 * len(PNG) - 1, hosts=hosts).param == "images.1"
    assert read(DATA, DATA, f"{url}/a.png", f"{url}/a.png", most=2 * len(PNG), hosts=hosts) == [PNG] * 4
    assert len(server.asked) == 2  # an address that is there twice is asked once
    refused = refusal(DATA, DATA, DATA, images=2)
    assert (refused.param, refused.code) == ("images.2", "too_many")


# -- over HTTP


def test_images_are_fetched_from_hosts_on_the_list(server):
    url = f"http://127.0.0.1:{server.port}"
    assert read(f"{url}/a.png?x=1#part", f"{url}/jpeg", hosts=[f"127.0.0.1:{server.port}"]) == [PNG] * 2
    assert sorted(server.asked)[0] == ("/a.png?x=1", f"127.0.0.1:{server.port}")
    names = [f"localhost:{server.port}", "127.0.0.0/8"]
    assert read(f"HTTP://LocalHost:{server.port}/a.png", hosts=names) == [PNG]
    assert server.asked[-1] == ("/a.png", f"localhost:{server.port}")


@pytest.mark.parametrize("path", ["missing", "moved", "page", "untyped", "zipped", "empty", "large", "endless", "cut", "slow"])
def test_answers_that_are_no_image_are_refused(server, path):
    says = {
        "missing": "404",
        "moved": "redirects",
        "page": "text/html",
        "untyped": "type is not told",
        "zipped": "compressed",
        "empty": "empty",
        "large": "bytes allowed",
        "endless": "bytes allowed",
        "cut": "could not be fetched",
        "slow": "0.2 s",
    }
    url = f"http://127.0.0.1:{server.port}/{path}"
    refused = refusal(url, hosts=[f"127.0.0.1:{server.port}"], timeout=0.2 if path == "slow" else 20)
    assert says[path] in refused.message and len(server.asked) == 1


def test_one_that_fails_ends_the_others(server):
    url, hosts = f"http://127.0.0.1:{server.port}", [f"127.0.0.1:{server.port}"]
    began = time.monotonic()
    assert refusal(f"{url}/slow", f"{url}/missing", hosts=hosts, timeout=30).param == "images.1"
    assert time.monotonic() - began < 15


def test_the_loop_goes_on_while_a_host_is_slow(server):
    async def run():
        media = MediaReader([f"127.0.0.1:{server.port}"], most_images=1, most_bytes=9999, timeout=0.5)
        reading = asyncio.ensure_future(media.read([("image", f"http://127.0.0.1:{server.port}/slow")]))
        turns = 0
        while not reading.done():
            await asyncio.sleep(0.01)
            turns += 1
        await media.close()
        return turns, reading.exception()

    turns, error = asyncio.run(run())
    assert turns > 10 and error.code == "timeout"


def test_hosts_that_are_not_listed_are_not_asked(server):
    url = f"http://127.0.0.1:{server.port}/a.png"
    assert "data: URL" in refusal(url).message  # no host is
    for hosts in (["example.org"], ["127.0.0.1"], [f"127.0.0.2:{server.port}"], ["*"], [f"*:{server.port}"]):
        assert refusal(url, hosts=hosts).code == "not_allowed"
    for hosts in ([f"localhost:{server.port}"], [f"*:{server.port}"]):  # whose address is private, and not listed
        assert "at an address" in refusal(url.replace("127.0.0.1", "localhost"), hosts=hosts).message
    mapped = url.replace("127.0.0.1", "[::ffff:127.0.0.1]")
    assert refusal(mapped, hosts=[f"*:{server.port}"]).code == "not_allowed"
    assert server.asked == []


def test_the_address_that_was_checked_is_the_one_that_is_asked(server, monkeypatch):
    """A name that changes what it says between the check and the connection gains nothing."""
    looks = []

    def getaddrinfo(host, port, **_):
        looks.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1" if len(looks) == 1 else "10.0.0.1", port))]

    monkeypatch.setattr("hf_paged.integrations.openai.media.socket.getaddrinfo", getaddrinfo)
    hosts = [f"images.example.org:{server.port}", "127.0.0.1"]
    assert refusal(f"http://images.example.org:{server.port}/a.png", hosts=[hosts[0]]).code == "not_allowed"
    looks.clear()
    hosts[1] += f":{server.port}"
    assert read(f"http://images.example.org:{server.port}/a.png", hosts=hosts) == [PNG]
    assert looks.count("images.example.org") == 1
    assert server.asked == [("/a.png", f"images.example.org:{server.port}")]


@pytest.mark.parametrize(
    "given", ["http://", "http:///a", "http://me:secret@localhost/a", "http://a\nb/", "http://a b/", "http://x/" + "a" * 9000]
)
def test_urls_that_are_none(given):
    assert refusal(given, hosts=["*"]).status == 400


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    assert refusal(f"http://127.0.0.1:{port}/a", hosts=[f"127.0.0.1:{port}"]).code == "unreachable"
    assert refusal("http://nobody.invalid/a", hosts=["nobody.invalid"]).code == "unreachable"


def test_certificates_are_checked_by_the_name(monkeypatch, tmp_path):
    import ssl

    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    with serve(context) as server:
        hosts = [f"localhost:{server.port}", f"127.0.0.1:{server.port}"]
        assert read(f"https://localhost:{server.port}/a.png", hosts=hosts) == [PNG]
        assert refusal(f"https://127.0.0.1:{server.port}/a.png", hosts=hosts).code == "unreachable"
        monkeypatch.delenv("SSL_CERT_FILE")
        assert refusal(f"https://localhost:{server.port}/a.png", hosts=hosts).code == "unreachable"


# -- the list


@pytest.mark.parametrize(
    ("entry", "asked", "permitted"),
    [
        ("example.org", ("https", "example.org", None), True),
        ("Example.org", ("http", "example.org", 80), True),
        ("example.org", ("https", "example.org", 80), False),
        ("example.org", ("https", "example.org", 8443), False),
        ("example.org:8443", ("https", "example.org", 8443), True),
        ("example.org:443", ("https", "example.org", None), True),
        ("example.org:8443", ("https", "example.org", None), False),
        ("example.org", ("https", "www.example.org", None), False),
        ("example.org", ("https", "notexample.org", None), False),
        ("*.example.org", ("https", "a.www.example.org", None), True),
        ("*.example.org", ("https", "example.org", None), False),
        ("*.example.org", ("https", "notexample.org", None), False),
        ("*", ("https", "anything.org", None), True),
        ("*", ("https", "8.8.8.8", None), True),
        ("10.0.0.0/8", ("http", "10.1.2.3", None), True),
        ("10.0.0.0/8", ("http", "11.1.2.3", None), False),
        ("10.0.0.0/8:8080", ("http", "10.1.2.3", 8080), True),
        ("10.1.2.3", ("http", "::ffff:10.1.2.3", None), True),
        ("[fd00::]/8", ("http", "fd00::1", None), True),
        ("fd00::/8", ("http", "fd00::1", None), True),
        ("[fd00::1]:81", ("http", "fd00::1", 81), True),
    ],
)
def test_who_is_on_the_list(entry, asked, permitted):
    assert AllowedHosts([entry]).permits(*asked) is permitted


@pytest.mark.parametrize(
    "entry", ["", "http://example.org", "example.org/path", "a b", "example.org:0", "example.org:99999", "*.", "*x.org", "1.2.3", "[::1"]
)
def test_entries_that_are_none(entry):
    with pytest.raises(InvalidArgument, match="allowed_media_hosts"):
        AllowedHosts([entry])


def test_private_addresses_have_to_be_listed():
    private = "127.0.0.1 10.0.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 ::1 fd00::1 fe80::1 ::ffff:10.0.0.1"
    for address in private.split():
        assert not AllowedHosts(["*", "example.org"]).permits_address(as_address(address), 80), address
        assert AllowedHosts([address if "ffff" not in address else "10.0.0.1"]).permits_address(as_address(address), 80)
    assert AllowedHosts(["example.org"]).permits_address(as_address("93.184.216.34"), 80)
    assert not AllowedHosts(["127.0.0.1:81"]).permits_address(as_address("127.0.0.1"), 80)
