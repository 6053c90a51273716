"""Connections that keep nobody waiting: uvicorn's, with a limit on the time that headers take."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def protocol(header_timeout: float, max_connections: int | None) -> type[H11Protocol]:
    """uvicorn's protocol for HTTP/1.1, which by itself waits forever for the rest of a request's headers.

    Args:
        header_timeout: seconds from a connection's begin, or from the first byte of a further request, to the end of the
            headers. (A TLS handshake is asyncio's to limit.)
        max_connections: what comes beyond is closed at once; None: no limit.
    """

    class Protocol(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if max_connections is not None and len(self.connections) > max_connections:
                transport.close()
            else:
                self._waiting = self.loop.call_later(header_timeout, self._too_slow)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_waiting()
            elif self._waiting is None:
                self._waiting = self.loop.call_later(header_timeout, self._too_slow)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _stop_waiting(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        def _too_slow(self) -> None:
            self._waiting = None
            if not self.transport.is_closing():
                self.transport.write(LATE)
                self.transport.close()

    return Protocol
