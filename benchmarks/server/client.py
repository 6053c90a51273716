"""A lean load generator: streamed requests over HTTP, each on a connection of its own.

While requests run, only the bytes that come and their times are noted: the generator shares the cores with the server.
Answers are read afterwards.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

import h11


@dataclass
class Exchange:
    """One request on its way. Times are `time.perf_counter`'s.

    Attributes:
        pieces: what came, each with the time it came at.
        problem: why the connection failed, if it did.
    """

    sent: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class Answer:
    """A streamed answer, read.

    Attributes:
        problem: what is wrong with it as an answer: another status than 200, an error, a stream that ends too early.
        times: seconds from sending the request to each event with tokens.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    times: list[float]
    problem: str | None


class _Connection(asyncio.Protocol):
    def __init__(self, request: bytes, exchange: Exchange, ended: asyncio.Future):
        self._request, self._pieces, self._ended = request, exchange.pieces, ended
        self._exchange = exchange

    def connection_made(self, transport) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self._exchange.problem = repr(error)
        if not self._ended.done():
            self._ended.set_result(None)


class Client:
    """Sends requests to one server.

    Args:
        port: of the server on this machine.
        path: of the route.
    """

    def __init__(self, port: int, path: str):
        self._port, self._path = port, path

    async def ask(self, body: dict, exchange: Exchange | None = None) -> Exchange:
        """Send a request, wait until the server closes the connection. `exchange` can be watched meanwhile."""
        exchange = exchange or Exchange()
        ended = asyncio.get_running_loop().create_future()
        head, data = _request(self._path, body)
        parser = h11.Connection(h11.CLIENT)
        request = parser.send(head) + parser.send(data)
        exchange.sent = time.perf_counter()
        try:
            transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(request, exchange, ended), "127.0.0.1", self._port
            )
        except OSError as error:
            exchange.problem = repr(error)
            return exchange
        try:
            await ended
        finally:
            transport.abort()
        return exchange

    def read(self, exchange: Exchange) -> Answer:
        """What the bytes of an exchange say."""
        parser = h11.Connection(h11.CLIENT)
        for part in _request(self._path, {}):
            parser.send(part)
        parser.send(h11.EndOfMessage())
        events = _Events()
        problem = exchange.problem
        try:
            for at, data in [*exchange.pieces, (0.0, b"")]:  # the last one is the end of the connection
                parser.receive_data(data)
                events.take(at - exchange.sent, parser)
        except (h11.RemoteProtocolError, ValueError) as error:
            problem = problem or repr(error)
        return events.answer(problem)


def _request(path: str, body: dict) -> tuple[h11.Request, h11.Data]:
    data = json.dumps(body).encode()
    headers = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(data)), "Connection": "close"}
    return h11.Request(method="POST", target=path, headers=list(headers.items())), h11.Data(data=data)


class _Events:
    """Gathers the server-sent events of one answer, in the form of chat completion chunks."""

    def __init__(self):
        self._status: int | None = None
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._times: list[float] = []
        self._reason: str | None = None
        self._error: str | None = None
        self._rest = b""
        self._done = False

    def take(self, at: float, parser: h11.Connection) -> None:
        while True:
            event = parser.next_event()
            if isinstance(event, h11.Response):
                self._status = event.status_code
            elif isinstance(event, h11.Data):
                *events, self._rest = (self._rest + bytes(event.data)).split(b"\n\n")
                for line in events:
                    self._event(at, line.removeprefix(b"data: "))
            else:
                return

    def _event(self, at: float, data: bytes) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            self._error = chunk["error"]["message"]
            return
        for choice in chunk["choices"]:
            self._text.append(choice["delta"].get("content") or "")
            self._reason = choice["finish_reason"] or self._reason
            if choice.get("token_ids"):
                self._tokens += choice["token_ids"]
                self._times.append(at)

    def answer(self, problem: str | None) -> Answer:
        if problem is None and self._status != 200:
            problem = f"status {self._status}: {self._rest.decode(errors='replace')[:200]}"
        if problem is None:
            problem = self._error or (None if self._done else "the stream ended too early")
        return Answer("".join(self._text), self._tokens, self._reason, self._times, problem)
