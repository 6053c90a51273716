"""What a server says of itself and its tokenizer: /v1/models, /tokenize, /detokenize, /health, /ping, /version."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Literal

from fastapi import APIRouter, Response
from openai.types import Model
from pydantic import BaseModel

from .body import strict_router
from .described import answers
from .errors import Refused
from .protocol import DetokenizeRequest, TokenizeRequest
from .service import Service
from .templates import chat_prompt
from .tools import ToolChoice, tools_of, usable_tools


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    prompt: str


_UP = {200: {"description": "It takes requests."}, 503: {"description": "It takes none."}}


def router(service: Service) -> APIRouter:
    routes = strict_router()

    def model(adapter: str | None = None) -> Model:
        return Model(
            id=adapter or service.model_name,
            object="model",
            created=service.started,
            owned_by="hf_paged",
            max_model_len=service.max_model_len,
            parent=adapter and service.model_name,
            **service.dialect.names,
        )

    @routes.get("/v1/models", response_model=None, responses=answers(whole=Models))
    async def models() -> dict:
        """The model, and every adapter that requests may name instead of it."""
        return {"object": "list", "data": [model(name).model_dump() for name in (None, *service.engine.engine.adapters)]}

    @routes.get("/v1/models/{name:path}", response_model=None, responses=answers(404, whole=Model))
    async def one(name: str) -> dict:
        return model(service.adapter(name)).model_dump()

    @routes.get("/health", response_class=Response, responses=_UP)
    async def health() -> Response:
        """200 while requests are taken, else 503."""
        return Response(status_code=200 if service.taking else 503)

    @routes.get("/ping", response_class=Response, responses=_UP)
    @routes.post("/ping", response_class=Response, responses=_UP)
    async def ping() -> Response:
        return Response(status_code=200 if service.taking else 503)

    @routes.get("/version", response_model=None, responses={200: {"model": dict[str, str]}})
    async def versions() -> dict:
        return {name: version(name) for name in ("hf_paged", "transformers", "torch")}

    @routes.post("/tokenize", response_model=None, responses=answers(400, 404, whole=Tokens))
    async def tokenize(body: TokenizeRequest) -> dict:
        """The tokens of a text, or of a conversation as the model sees it."""
        service.adapter(body.model)
        tokens = await _tokenize(service, body)
        strings = {"token_strs": service.tokenizer.convert_ids_to_tokens(tokens)} if body.return_token_strs else {}
        return {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens, **strings}

    @routes.post("/detokenize", response_model=None, responses=answers(400, 404, whole=Text))
    async def detokenize(body: DetokenizeRequest) -> dict:
        service.adapter(body.model)
        return {"prompt": await asyncio.to_thread(_detokenize, service, body)}

    return routes


async def _tokenize(service: Service, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise Refused("exactly one of prompt and messages must be given", param="prompt", code="invalid_value")
    if body.prompt is not None:
        service.check_length("prompt", body.prompt)
        made = await asyncio.to_thread(service.tokenizer, body.prompt, add_special_tokens=body.add_special_tokens)
        return made.input_ids
    tools = usable_tools(tools_of(tool.function for tool in body.tools or ()), ToolChoice(), service.settings.limits)
    prompt = await chat_prompt(
        service,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        chat_template_kwargs=body.chat_template_kwargs,
        tools=list(tools.values()),
    )
    return prompt.token_ids


def _detokenize(service: Service, body: DetokenizeRequest) -> str:
    size = service.engine.engine.model.vocab_size
    for token in body.tokens:
        if not 0 <= token < size:
            raise Refused(f"tokens: {token} is outside the vocabulary of {size}", param="tokens", code="invalid_value")
    return service.tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
