"""What goes wrong, as OpenAI's clients expect to be told."""

from __future__ import annotations

import logging
import re

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from ...base.errors import (
    DeadlineExceeded,
    EngineClosed,
    HfPagedError,
    InvalidArgument,
    KernelUnavailable,
    ParallelError,
    QueueFull,
    RequestFailed,
    RequestTooLarge,
)
from .observation import current

log = logging.getLogger("hf_paged.server")

RETRY_AFTER = 1  # seconds; what waits in a full queue is usually further by then
PARTS = frozenset(["text", "image_url", "input_text", "output_text", "input_image"])  # types of a message's parts
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\[\]]*")


class Refused(Exception):
    """A request that is wrong.

    Attributes:
        param: the field that is; None for the request as a whole.
        status: of the answer.
        code: a short name of the reason.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


def describe(error: BaseException) -> Refused:
    """Any error as an answer. What is not the caller's fault is not told in detail."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, RequestFailed) and isinstance(error.__cause__, InvalidArgument | EngineClosed | ParallelError):
        error = error.__cause__
    message = str(error)
    if isinstance(error, RequestTooLarge):
        return Refused(message, param="max_tokens", code="context_length_exceeded")
    if isinstance(error, InvalidArgument):
        name = _NAME.match(message)
        return Refused(message, param=name and name.group(), code="invalid_value")
    if isinstance(error, QueueFull):
        return Refused("too many requests wait already; try again later", status=429, code="queue_full")
    if isinstance(error, DeadlineExceeded):
        return Refused(message, status=504, code="timeout")
    if isinstance(error, EngineClosed | ParallelError):
        return Refused("the server is going down", status=503, code="closed")
    if isinstance(error, RequestFailed) and isinstance(error.__cause__, FloatingPointError | ValueError):
        return Refused(message, status=422, code="cannot_sample")
    if isinstance(error, KernelUnavailable):
        return Refused(message, status=503, code="unavailable")
    unknown = Refused("the server failed at this request", status=500, code="internal_error")
    unknown.__cause__ = error
    return unknown


def body_of(error: Refused) -> dict:
    """What the client is told, which is also what the log and the counts say of the request."""
    observation = current()
    if observation is not None:
        observation.error = error.code or str(error.status)
    if error.status >= 500 and error.__cause__ is not None:
        fields = {"request_id": observation.request_id if observation is not None else None}
        log.error("a request failed", exc_info=error.__cause__, extra={"fields": fields})
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(error.status)
    kind = kind or ("invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def answer(error: BaseException) -> JSONResponse:
    refused = describe(error)
    headers = {"Retry-After": str(RETRY_AFTER)} if refused.status in (429, 503) else None
    return JSONResponse(body_of(refused), status_code=refused.status, headers=headers)


def _field(place: tuple) -> str | None:
    """The field that pydantic means, without the type it tried for it, or went by in a list of several."""
    untagged = [part for before, part in zip((None, *place), place) if not (isinstance(before, int) and part in PARTS)]
    known = [str(part) for part in untagged if isinstance(part, int) or re.fullmatch(r"[a-z_][a-z0-9_]*", part)]
    known = [part for part in known if part not in ("body", "query", "path", "float", "int", "str", "bool")]
    return ".".join(known) or None


def _methods(request: Request) -> str:
    """All that the path may be asked with; the router itself names those of one route."""

    def routed(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes)

    return ", ".join(method for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE") if routed(method))


def install(app) -> None:
    """Every error of `app` has one form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # of what is wrong with each form that a field may have, that which shows last: most of the form was there
        shown = max(error.errors(), key=lambda one: len(one["loc"]))
        name = _field(shown["loc"])
        message = f"{name}: {shown['msg']}" if name else shown["msg"]
        if shown["type"] == "extra_forbidden":
            message = f"{name} is not a field this server knows"
        return answer(Refused(message, param=name, code=shown["type"]))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        refused = Refused(str(error.detail), status=error.status_code, code=code)
        headers = {"Allow": _methods(request)} if error.status_code == 405 else error.headers
        return JSONResponse(body_of(refused), status_code=error.status_code, headers=headers)

    @app.exception_handler(Refused)
    @app.exception_handler(HfPagedError)
    async def known(_: Request, error: Exception) -> JSONResponse:
        return answer(error)
