"""Bodies of requests: JSON that means one thing only, and takes no more work than its size."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

OBJECTS = 65_536  # of one body, and members of one object: more than any request has, few enough to complain about each
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def strict_router(**options) -> APIRouter:
    """A router whose routes read bodies as `read_json` does."""
    return APIRouter(route_class=_Route, **options)


class _Route(APIRoute):
    def get_route_handler(self) -> Callable:
        handle = super().get_route_handler()

        async def strict(request: Request):
            return await handle(_Strict(request.scope, request.receive))

        return strict


class _Strict(Request):
    async def json(self) -> Any:
        encoding = self.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise HTTPException(415, f"Content-Encoding {encoding[:40]!r} is not supported; send the body as it is")
        try:
            return read_json(await self.body())
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the body is no JSON: {str(error)[:200]}") from None


def read_json(body: bytes) -> Any:
    """What `body` holds.

    Raises ValueError or RecursionError for what is no JSON; for names that an object has twice, of which a client may
    mean either; for half characters; and for what is nested too deeply or has too many objects.
    """
    text = body.decode("utf-8")
    objects = 0

    def checked(pairs: list[tuple[str, Any]]) -> dict:
        nonlocal objects
        objects += 1
        if objects > OBJECTS or len(pairs) > OBJECTS:
            raise ValueError(f"more than {OBJECTS} objects, or members of one object")
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"{twice[:100]!r} is there twice in one object")
        return made

    value = json.loads(text, object_pairs_hook=checked, parse_constant=_no_number)
    if _HALF.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # escapes for both halves of a character make it whole
    return value


def _no_number(name: str):
    raise ValueError(f"{name} is not a number of JSON")
