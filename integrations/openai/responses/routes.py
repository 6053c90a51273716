"""The routes of /v1/responses."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from openai.types.responses import Response
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from ..auth import key_of
from ..body import strict_router
from ..described import GENERATES, answers
from ..errors import Refused
from ..service import Service, while_connected
from ..streaming import sent
from .protocol import ListItems, ResponsesRequest, Retrieve
from .run import Run
from .store import Record, Store


class Deleted(BaseModel):
    """What a deleted response leaves."""

    id: str
    object: str = "response"
    deleted: bool = True


def router(service: Service) -> APIRouter:
    settings = service.settings
    store = Store(settings.stored_responses, settings.stored_response_bytes)
    routes = strict_router()
    _create(routes, service, store)
    _read(routes, service, store)
    return routes


def _create(routes: APIRouter, service: Service, store: Store) -> None:
    @routes.post(
        "/v1/responses",
        response_model=None,
        responses=answers(*GENERATES, whole=Response, events="OpenAI's events of a response"),
    )
    async def create(body: ResponsesRequest, request: Request):
        """Answer, and keep the answer for what follows."""
        run = await Run.prepare(service, store, body, _owner(service, request))
        if body.background:
            run.in_background()
            return sent(run.record.read(0)) if body.stream else _told(run.record)
        if body.stream:
            return sent(await while_connected(request, run.events()))
        return JSONResponse(to_jsonable_python(await while_connected(request, run.whole()), inf_nan_mode="null"))


def _read(routes: APIRouter, service: Service, store: Store) -> None:
    place = "/v1/responses/{response_id}"

    def found(response_id: str, request: Request) -> Record:
        return store.get(response_id, _owner(service, request))

    @routes.get(
        place, response_model=None, responses=answers(400, 404, whole=Response, events="OpenAI's events of a response")
    )
    async def retrieve(response_id: str, asked: Annotated[Retrieve, Query()], request: Request):
        """A response that is kept, or its events, from after number `starting_after`."""
        record = found(response_id, request)
        if not asked.stream:
            if asked.starting_after is not None:
                raise Refused("starting_after needs stream=true", param="starting_after", code="invalid_value")
            return _told(record)
        if record.events is None:
            raise Refused("stream: it was not made with background and stream", param="stream", code="invalid_value")
        return sent(record.read(0 if asked.starting_after is None else asked.starting_after + 1))

    @routes.post(f"{place}/cancel", response_model=None, responses=answers(400, 404, whole=Response))
    async def cancel(response_id: str, request: Request):
        """End a response that runs in the background; one that has ended stays as it is."""
        record = found(response_id, request)
        if not record.response["background"]:
            message = "response_id: only what runs in the background can be cancelled; close the connection instead"
            raise Refused(message, param="response_id", code="invalid_value")
        if record.task is not None:
            record.task.cancel()
            await asyncio.wait({record.task})
        return _told(record)

    @routes.delete(place, response_model=None, responses=answers(404, whole=Deleted))
    async def delete(response_id: str, request: Request):
        """Forget a response, and end it if it runs."""
        store.forget(found(response_id, request))
        return Deleted(id=response_id)

    @routes.get(f"{place}/input_items", response_model=None, responses=answers(400, 404, whole=ResponseItemList))
    async def input_items(response_id: str, asked: Annotated[ListItems, Query()], request: Request):
        """All that the model was given for a response, earlier turns included."""
        return _page(found(response_id, request).items, asked)


def _page(items: list[dict], asked: ListItems) -> dict:
    items = items if asked.order == "asc" else items[::-1]
    if asked.after is not None:
        place = next((place for place, item in enumerate(items) if item["id"] == asked.after), None)
        if place is None:
            raise Refused(f"after: there is no item {asked.after!r}", param="after", code="invalid_value")
        items = items[place + 1 :]
    page = items[: asked.limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": "", "last_id": ""}
    return {"object": "list", "data": page, "has_more": len(items) > len(page), **ends}


def _owner(service: Service, request: Request) -> bytes | None:
    return key_of(request.scope) if service.settings.api_keys else None


def _told(record: Record) -> JSONResponse:
    return JSONResponse(to_jsonable_python(record.response, inf_nan_mode="null"))
