"""Chat templates that requests bring: run elsewhere, for a short time, in little memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path

from .errors import Refused

SECONDS = 2.0  # for one template
BYTES = 256 * 2**20  # of memory for it
CHARACTERS = 64 * 1024  # of a template
AT_ONCE = 2  # templates; more are answered 429, so that they do not keep threads from what others need
_KEPT = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH")  # of the environment; API keys are not


class Sandbox:
    """Renders templates in forks of a process that is started once; see template_worker.py. For any number of threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(AT_ONCE)
        self._channel: socket.socket | None = None
        self._ends = None

    def render(self, chat_template: str, *, must_read: list[str], most: int, **arguments) -> str:
        """What transformers' `render_jinja_template` makes of one conversation.

        Args:
            must_read: names that the template has to read; what they stand for would else be ignored.
            most: characters that it may make.
            arguments: of `render_jinja_template`, as JSON has them.

        Raises Refused for a template that fails or takes too long, and (429) if there are too many at once.
        """
        if len(chat_template) > CHARACTERS:
            raise _refused(f"{len(chat_template)} characters are more than the {CHARACTERS} allowed")
        if not self._slots.acquire(blocking=False):
            raise Refused("chat_template: too many run already; try again later", status=429, code="queue_full")
        try:
            arguments["chat_template"] = chat_template
            request = {"arguments": arguments, "must_read": must_read, "most": most}
            answer = self._ask(json.dumps(request, default=str).encode())  # special tokens may be objects
        finally:
            self._slots.release()
        if not answer:
            raise _refused(f"it takes more than {SECONDS:g} s, or more than {BYTES >> 20} MiB")
        told = json.loads(answer)
        if "error" in told:
            raise _refused(told["error"])
        return told["text"]

    def _ask(self, request: bytes) -> bytes:
        mine, theirs = socket.socketpair()
        with mine:
            with theirs:
                self._send(theirs)
            mine.settimeout(10 * SECONDS + 10)  # it ends by itself; this is for a machine that hardly runs
            try:
                mine.sendall(request)
                mine.shutdown(socket.SHUT_WR)
                pieces = []
                while piece := mine.recv(1 << 16):
                    pieces.append(piece)
            except OSError:  # it ended before it had read everything
                return b""
        return b"".join(pieces)

    def _send(self, connection: socket.socket) -> None:
        with self._lock:
            try:
                if self._channel is None:
                    self._start()
                socket.send_fds(self._channel, [b"x"], [connection.fileno()])
            except OSError:  # somebody ended it
                self._start()
                socket.send_fds(self._channel, [b"x"], [connection.fileno()])

    def _start(self) -> None:
        if self._ends is not None:
            self._ends()
        self._channel, theirs = socket.socketpair()
        script = Path(__file__).with_name("template_worker.py")
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", str(script), str(SECONDS), str(BYTES)], stdin=theirs, env=environment
            )
        self._ends = weakref.finalize(self, _end, self._channel, process)


def _end(channel: socket.socket, process: subprocess.Popen) -> None:
    channel.close()  # which ends the process, too
    process.wait()


def _refused(message: str) -> Refused:
    return Refused(f"chat_template: {message}", param="chat_template", code="template")
