"""Who may use a server: API keys, as OpenAI's clients send them."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from ...base.errors import InvalidArgument
from .errors import Refused, answer
from .page import PATH

VARIABLE = "HF_PAGED_API_KEYS"  # keys, separated by commas
OPEN = frozenset({"/health", "/ping"})  # what load balancers ask; everything else but the chat page needs a key


def read_keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """All keys: those given, one a line of `file`, and those of the environment.

    Raises InvalidArgument for a file without keys.
    """
    keys = list(given)
    if file is not None:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise InvalidArgument(f"api_key_file: {file} holds no keys")
        keys += found
    keys += [key.strip() for key in os.environ.get(VARIABLE, "").split(",") if key.strip()]
    return tuple(dict.fromkeys(keys))


def check_keys(keys: tuple[str, ...]) -> None:
    """Raises InvalidArgument for keys that no header can hold."""
    if not isinstance(keys, tuple) or not all(isinstance(key, str) for key in keys):
        raise InvalidArgument("api_keys must be a tuple of strings")
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise InvalidArgument("api_keys must be printable ASCII without spaces")


def path_of(scope: Scope) -> str:
    """A request's path below where the app is mounted: the very string that its router goes by."""
    root, path = scope.get("root_path", ""), scope["path"]
    return path[len(root) :] if path == root or path.startswith(root + "/") else path


class RequireKey:
    """Answers 401 to requests without one of the keys, but for exactly the paths in OPEN, and the chat page.

    Keys are compared by their digests, all of them each time, so that the time taken says nothing about them.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], page: bool):
        self._app = app
        self._open = OPEN | {PATH} if page else OPEN
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._needs_none(scope) or self._allowed(scope):
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        response = answer(Refused("a valid API key is needed", status=401, code="invalid_api_key"))
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _needs_none(self, scope: Scope) -> bool:
        """Only the very path that is routed counts, below wherever the app is mounted."""
        return scope["type"] == "http" and path_of(scope) in self._open

    def _allowed(self, scope: Scope) -> bool:
        digest = key_of(scope)
        return digest is not None and sum(hmac.compare_digest(digest, own) for own in self._digests) > 0


def key_of(scope: Scope) -> bytes | None:
    """Digest of the key that came with a request; None if there is none, or more than one."""
    sent = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, key = sent[0].partition(b" ") if len(sent) == 1 else (b"", b"", b"")
    return _digest(key.strip()) if scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
