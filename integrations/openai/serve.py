"""The app in a server process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from ...base.errors import InvalidArgument
from . import logs
from .connection import protocol
from .tls import tls_context

HEADER_BYTES = 64 * 1024  # of a request line and its headers; more closes the connection
YOUNG = 2_000  # new objects from one collection to the next: with the default of 700 a crowd of requests spends a fifth on them
SWITCH = 0.001  # seconds that a thread may keep others from Python: the loop meets the engine's thread at every send
ACCEPTS = 32  # connections that asyncio accepts in one turn of the event loop; it takes the backlog for their number
LAST_SECONDS = 5  # for what was cut off to be told so
DONE, CUT = 0, 1  # exit statuses

log = logging.getLogger("hf_paged.server")


@dataclass(frozen=True, kw_only=True)
class Process:
    """How a server process listens, ends and logs.

    Attributes:
        host, port: where to listen; port 0 is any free one.
        uds: path of a Unix socket to listen at instead.
        root_path: what a proxy takes off the front of the paths.
        backlog: connections that wait to be accepted.
        keep_alive: seconds that an idle connection is kept.
        header_timeout: seconds in which a request's headers must have come.
        max_connections: open at once; more are closed. None: as many as the system allows.
        ssl_certfile, ssl_keyfile, ssl_keyfile_password, ssl_ca_certs: see `tls.tls_context`; None: no TLS.
        grace: seconds that running requests get to end in when the server is stopped; then they are cut off.
        log_format, log_level: see `logs`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: Path | None = None
    root_path: str = ""
    backlog: int = 2048
    keep_alive: float = 5.0
    header_timeout: float = 15.0
    max_connections: int | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: Path | None = None
    grace: float = 30.0
    log_format: str = "text"
    log_level: str = "info"

    def __post_init__(self):
        logs.check(self.log_format, self.log_level)
        for name in ("keep_alive", "header_timeout"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} must be a positive number of seconds, got {getattr(self, name)!r}")
        if not self.grace >= 0:
            raise InvalidArgument(f"grace must be a number of seconds, got {self.grace!r}")
        if self.root_path and not (self.root_path.startswith("/") and not self.root_path.endswith("/")):
            raise InvalidArgument(f"root_path must begin with / and not end with it, got {self.root_path!r}")
        self.tls()

    def tls(self) -> ssl.SSLContext | None:
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
                if getattr(self, name) is not None:
                    raise InvalidArgument(f"{name} needs ssl_certfile")
            return None
        return tls_context(self.ssl_certfile, self.ssl_keyfile, self.ssl_keyfile_password, self.ssl_ca_certs)


def serve(app: FastAPI, process: Process, listeners: list[socket.socket] | None) -> int:
    """Serve until SIGINT or SIGTERM, then let what runs come to its end; a second signal cuts it off.

    Args:
        listeners: from `listening`.

    Returns the process' exit status: 0 if everything came to its end, 1 if something had to be cut off.
    """
    logs.configure(process.log_format, process.log_level)
    _allow_many_files()
    server = Server(app, process)
    with few_pauses():
        server.run(listeners)
    return CUT if server.was_cut else DONE


@contextlib.contextmanager
def few_pauses() -> Iterator[None]:
    """The process is set up for short pauses, and as it was afterwards: libraries are taken down properly."""
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.collect()
    gc.freeze()  # the model and its libraries are here to stay: every full collection would look through them, for long
    gc.set_threshold(YOUNG)
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
        gc.unfreeze()


@contextlib.contextmanager
def listening(process: Process) -> Iterator[list[socket.socket] | None]:
    """Sockets at the process' address, at which nobody is answered yet; None for a Unix socket, which uvicorn makes.

    Raises InvalidArgument if it cannot be had: better before a model is loaded than after.
    """
    if process.uds is not None:
        yield None
        return
    try:
        places = socket.getaddrinfo(process.host, process.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InvalidArgument(f"host: {process.host}: {error.strerror}") from None
    problem = None
    with contextlib.ExitStack() as stack:
        listeners = []
        for family, _, _, _, address in dict.fromkeys(places if process.port else places[:1]):
            try:
                listeners.append(stack.enter_context(_bound(family, address)))
            except OSError as error:
                problem = error
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # else the machine has no such network
                    break
        else:
            if listeners:
                yield listeners
                return
    raise InvalidArgument(f"port: {process.port} at {process.host}: {problem.strerror}")


def _bound(family: int, address: tuple) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # where it would let others listen beside us
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


class Server(uvicorn.Server):
    """uvicorn's, which goes on listening while it drains: /health tells load balancers to leave, others are told 503.

    Attributes:
        was_cut: whether requests were not let come to their end.
    """

    def __init__(self, app: FastAPI, process: Process):
        config = uvicorn.Config(
            app,
            host=process.host,
            port=process.port,
            uds=None if process.uds is None else str(process.uds),
            root_path=process.root_path,
            backlog=ACCEPTS if process.uds is None else process.backlog,
            http=protocol(process.header_timeout, process.max_connections),
            ws="none",
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=process.keep_alive,
            timeout_graceful_shutdown=LAST_SECONDS,
            log_config=None,
            access_log=False,
            server_header=False,
        )
        config.load()
        config.ssl = process.tls()
        super().__init__(config)
        self._backlog = process.backlog
        self._drain, self._grace = app.state.service.drain, process.grace
        self._signals = 0
        self._ends: float | None = None  # when the grace is over, on the loop's clock
        self.was_cut = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(self._backlog)
        names = [server_socket.getsockname() for server in self.servers for server_socket in server.sockets]
        scheme = "https" if self.config.ssl else "http"
        addresses = [name if isinstance(name, str) else f"{scheme}://{_host(name[0])}:{name[1]}" for name in names]
        log.info("listening", extra={"fields": {"at": addresses}})

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but that the process is not ended by the signal in the end: it has an exit status to tell."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame) -> None:
        self._signals += 1
        self._drain.begin()

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        if not self._signals:
            return False
        now = asyncio.get_running_loop().time()
        if self._ends is None:
            self._ends = now + self._grace
            log.info("stopping", extra={"fields": {"open_requests": self._drain.open, "grace_s": self._grace}})
        if self._drain.open and self._signals == 1 and now < self._ends:
            return False
        if self._drain.open:
            self.was_cut = True
            log.warning("cutting requests off", extra={"fields": {"open_requests": self._drain.open}})
            await self._drain.cut(LAST_SECONDS)
        return True


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _allow_many_files() -> None:
    """Every connection is an open file, of which the soft limit often allows 1024."""
    if sys.platform == "win32":
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
