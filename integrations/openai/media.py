"""Images that requests name: in the request itself, as data URLs, or at hosts that the server may fetch from.

What a URL can make a server do is kept small: hosts from an allow-list, whose addresses are checked and then connected to
(a second look at the name may find others), no redirects, no proxies, no compression, and bounds on bytes and seconds.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

from .errors import Refused
from .media_hosts import DEFAULT_PORTS, AllowedHosts, as_address

TYPES = frozenset(f"image/{name}" for name in ("png", "jpeg", "jpg", "webp", "gif", "bmp"))
URL_CHARACTERS = 8192  # of an address to fetch from
FETCHES = 16  # at once, of all requests; others wait, in their own time
RESOLVERS = 4  # threads that look names up; they may hang for as long as the system's resolver does


class MediaReader:
    """Reads the images of requests.

    Args:
        hosts: where images may be fetched from; see `AllowedHosts`.
        most_images: of one request.
        most_bytes: of all images of one request, as they are encoded.
        timeout: seconds in which a request's images must have come.
    """

    def __init__(self, hosts: Sequence[str], *, most_images: int, most_bytes: int, timeout: float):
        self._hosts = AllowedHosts(hosts)
        self._most_images, self._most_bytes, self._timeout = most_images, most_bytes, timeout
        self._turn = asyncio.Semaphore(FETCHES)
        self._resolvers = ThreadPoolExecutor(RESOLVERS, thread_name_prefix="media-names")
        self._client: httpx.AsyncClient | None = None

    async def read(self, urls: Sequence[tuple[str, str]]) -> list[bytes]:
        """The encoded images at some URLs, each given with the name of the field it is in.

        Raises Refused, naming the field, for the first that cannot be had.
        """
        if len(urls) > self._most_images:
            name = urls[self._most_images][0]
            message = f"{name}: {len(urls)} images are more than the {self._most_images} allowed"
            raise Refused(message, param=name, code="too_many")
        names: dict[str, str] = {}  # one that is there twice is read once
        for name, url in urls:
            names.setdefault(url, name)
        budget = _Budget(self._most_bytes)
        inside = {url: name for url, name in names.items() if _scheme(url) == "data"}
        images = await asyncio.to_thread(lambda: {url: _decoded(name, url, budget) for url, name in inside.items()})
        outside = [(url, name) for url, name in names.items() if url not in inside]
        for url, name in outside:
            self._check(name, url)
        reads = [asyncio.ensure_future(self._read(name, url, budget)) for url, name in outside]
        try:
            images |= zip((url for url, _ in outside), await asyncio.gather(*reads), strict=True)
        finally:
            for read in reads:
                read.cancel()
            await asyncio.gather(*reads, return_exceptions=True)
        return [images[url] for _, url in urls]

    async def close(self) -> None:
        self._resolvers.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            await self._client.aclose()

    async def _read(self, name: str, url: str, budget: _Budget) -> bytes:
        try:
            async with asyncio.timeout(self._timeout), self._turn:
                return await self._fetched(name, httpx.URL(url), budget)
        except TimeoutError:
            raise _refused(name, f"it did not come within {self._timeout:g} s", "timeout") from None

    async def _fetched(self, name: str, target: httpx.URL, budget: _Budget) -> bytes:
        address = await self._resolved(name, target)
        client = await self._connected_client()
        request = client.build_request(
            "GET",
            target.copy_with(host=address, fragment=None),
            headers={"Host": target.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"},
            extensions={"sni_hostname": _host(target)},  # whose certificate it must be
        )
        try:
            async with contextlib.aclosing(await client.send(request, stream=True)) as answer:
                self._check_answer(name, answer, budget)
                parts = []
                async for part in answer.aiter_raw():
                    budget.take(name, len(part))
                    parts.append(part)
        except httpx.HTTPError as error:
            raise _refused(name, f"it could not be fetched ({type(error).__name__})", "unreachable") from None
        return _some(name, b"".join(parts))

    def _check(self, name: str, url: str) -> None:
        """Raise Refused unless the URL may be asked for."""
        if _scheme(url) not in ("http", "https"):
            raise _refused(name, "it is neither a data: URL nor one of http or https")
        if not self._hosts:
            raise _refused(name, "this server fetches no images; send a data: URL", "not_allowed")
        if len(url) > URL_CHARACTERS:
            raise _refused(name, f"its {len(url)} characters are more than the {URL_CHARACTERS} of a URL", "too_large")
        try:
            target = httpx.URL(url)
        except (httpx.InvalidURL, ValueError):
            raise _refused(name, "it is no URL") from None
        if not target.host or target.userinfo:
            raise _refused(name, "a URL with a host, and without a user, is needed")
        if not self._hosts.permits(target.scheme, _host(target), target.port):
            raise _refused(name, f"this server fetches no images from {target.netloc.decode('ascii')}", "not_allowed")

    async def _resolved(self, name: str, target: httpx.URL) -> str:
        """An address of the URL's host. All it has must be permitted: who answers for the name may not choose."""
        host, port = _host(target), target.port or DEFAULT_PORTS[target.scheme]
        look_up = asyncio.get_running_loop().run_in_executor
        try:
            found = await look_up(self._resolvers, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError):
            raise _refused(name, "its host is not known", "unreachable") from None
        addresses = [as_address(place[4][0]) for place in found]
        if not all(self._hosts.permits_address(address, port) for address in addresses):
            raise _refused(name, "its host is at an address that this server fetches no images from", "not_allowed")
        return str(addresses[0])

    def _check_answer(self, name: str, answer: httpx.Response, budget: _Budget) -> None:
        if 300 <= answer.status_code < 400:
            raise _refused(name, f"it redirects ({answer.status_code}), which is not followed", "not_allowed")
        if answer.status_code != 200:
            raise _refused(name, f"its host answered {answer.status_code}", "unreachable")
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            raise _refused(name, "its host sent it compressed, which was not asked for", "unsupported")
        _check_type(name, answer.headers.get("content-type", ""))
        length = answer.headers.get("content-length", "")
        if length.isdecimal():
            budget.check(name, int(length))

    async def _connected_client(self) -> httpx.AsyncClient:
        if self._client is None:
            context = await asyncio.to_thread(httpx.create_ssl_context)  # which reads the authorities' certificates
            if self._client is None:
                self._client = httpx.AsyncClient(
                    verify=context,
                    trust_env=False,
                    follow_redirects=False,
                    timeout=None,  # there is one for the whole
                    # connections are made to addresses: one kept may be another name's, whose certificate was not checked
                    limits=httpx.Limits(max_keepalive_connections=0),
                )
        return self._client


class _Budget:
    """Bytes that the images of a request may still have."""

    def __init__(self, most: int):
        self._most = self._left = most

    def check(self, name: str, count: int) -> None:
        if count > self._left:
            message = f"the images are more than the {self._most} bytes allowed for all of a request"
            raise _refused(name, message, "too_large")

    def take(self, name: str, count: int) -> None:
        self.check(name, count)
        self._left -= count


def _scheme(url: str) -> str:
    return url[:16].partition(":")[0].lower()


def _host(target: httpx.URL) -> str:
    """As names are looked up: in ASCII."""
    return target.raw_host.decode("ascii")


def _decoded(name: str, url: str, budget: _Budget) -> bytes:
    """What a data URL holds."""
    head, comma, payload = url[len("data:") :].partition(",")
    kind, *options = head.split(";")
    if not comma or not options or options[-1].strip().lower() != "base64":
        raise _refused(name, "a data: URL must look like data:image/png;base64,...")
    _check_type(name, kind)
    budget.take(name, len(payload) // 4 * 3 - payload[-2:].count("="))
    try:
        return _some(name, base64.b64decode(payload, validate=True))
    except ValueError:
        raise _refused(name, "its data are not base64") from None


def _check_type(name: str, content_type: str) -> None:
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in TYPES:
        said = f"it is {kind[:64]!r}" if kind else "its type is not told"
        raise _refused(name, f"{said}; images are {', '.join(sorted(TYPES))}", "unsupported")


def _some(name: str, data: bytes) -> bytes:
    if not data:
        raise _refused(name, "it is empty")
    return data


def _refused(name: str, message: str, code: str = "invalid_value") -> Refused:
    return Refused(f"{name}: {message}", param=name, code=code)
