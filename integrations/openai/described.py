"""What the app says of its routes in OpenAPI: every status they answer with, and the form of each answer.

Only told, never checked while serving: routes keep `response_model=None`, and their answers are not looked at again.
"""

from __future__ import annotations

from fastapi import FastAPI
from openai.types import ErrorObject
from pydantic import BaseModel

from .auth import OPEN

_MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "A valid API key is needed.",
    404: "There is no such thing here.",
    408: "The body did not come in time.",
    413: "The body is too long.",
    422: "The request cannot be carried out.",
    429: "Too many requests wait already.",
    500: "The server failed at this request.",
    503: "The server takes no requests now.",
    504: "The request took longer than the server allows.",
}
GENERATES = (400, 404, 422, 429, 503, 504)  # what asks the engine may be answered with
_EVENT = {  # each of a stream's
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_VALIDATION = ("HTTPValidationError", "ValidationError")  # FastAPI's own form of errors, which errors.py replaces


class ErrorBody(BaseModel):
    """Every error's form."""

    error: ErrorObject


def answers(*statuses: int, whole: type[BaseModel] | None = None, events: str | None = None) -> dict:
    """`responses` of a route.

    Args:
        statuses: of its errors; 401, 408 and 413 are added where they can be.
        whole: form of its JSON.
        events: what the events of a streamed answer hold, if it can be streamed.
    """
    told: dict = {status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in statuses}
    if whole is not None:
        told[200] = {"model": whole, "description": "The answer, whole."}
    if events is not None:
        told[200]["description"] = "The answer, whole; or, with `stream`, in pieces."
        told[200]["content"] = {"text/event-stream": {"schema": {**_EVENT, "description": events}}}
    return told


def install(app: FastAPI, keys: bool) -> None:
    """Make `app` describe itself. `keys`: whether it asks for API keys."""
    original = app.openapi

    def openapi() -> dict:
        if not app.openapi_schema:
            _complete(original(), keys)
        return app.openapi_schema

    app.openapi = openapi


def _complete(schema: dict, keys: bool) -> None:
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            told = operation["responses"]
            if _refers_to(told.get("422"), _VALIDATION[0]):
                del told["422"]
            if "requestBody" in operation:
                told |= {"408": _error(408), "413": _error(413)}
            if keys and path not in OPEN:
                told["401"] = _error(401)
                operation["security"] = [{"bearer": []}]
    parts = schema.setdefault("components", {})
    forms = parts.setdefault("schemas", {})
    for name in _VALIDATION:
        forms.pop(name, None)
    forms.setdefault("ErrorBody", ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}"))
    for name, form in forms["ErrorBody"].pop("$defs", {}).items():
        forms.setdefault(name, form)
    if keys:
        parts["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}


def _error(status: int) -> dict:
    form = {"schema": {"$ref": "#/components/schemas/ErrorBody"}}
    return {"description": _MEANINGS[status], "content": {"application/json": form}}


def _refers_to(response: dict | None, name: str) -> bool:
    form = (response or {}).get("content", {}).get("application/json", {}).get("schema", {})
    return form.get("$ref", "").endswith(f"/{name}")
