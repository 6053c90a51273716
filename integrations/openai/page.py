"""A page to talk to the model with, at `/`: one file, sent from memory, that asks the same routes as any client."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter, Request, Response

PATH = "/"


def router() -> APIRouter:
    """The page. Anybody may load it: it holds nothing but what is in the package."""
    routes = APIRouter()
    text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    body = text.encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {
        "ETag": tag,
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _policy(text),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
    }

    @routes.api_route(PATH, methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        known = {one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")}
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type="text/html", headers=headers)

    return routes


def _policy(text: str) -> str:
    """Nothing may run or be loaded but what the page itself holds; it may ask this server only, and no script may
    turn text into HTML."""

    def own(element: str) -> str:
        found = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in found)

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {own('script')}",
            f"style-src {own('style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
