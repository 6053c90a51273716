"""What a server says of itself and its tokenizer: /v1/models, /tokenize, /detokenize, /health, /ping, /version."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from fastapi import APIRouter, Response
from openai.types import Model

from .errors import Refused
from .protocol import DetokenizeRequest, TokenizeRequest
from .service import Service
from .templates import chat_tokens


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    def model() -> Model:
        return Model(
            id=service.model_name,
            object="model",
            created=service.started,
            owned_by="hf_paged",
            max_model_len=service.max_model_len,
        )

    @routes.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [model().model_dump()]}

    @routes.get("/v1/models/{name:path}")
    async def one(name: str) -> dict:
        service.check_model(name)
        return model().model_dump()

    @routes.get("/health")
    async def health() -> Response:
        """200 while requests are taken, else 503."""
        return Response(status_code=200 if service.taking else 503)

    @routes.get("/ping")
    @routes.post("/ping")
    async def ping() -> Response:
        return Response(status_code=200 if service.taking else 503)

    @routes.get("/version")
    async def versions() -> dict:
        return {name: version(name) for name in ("hf_paged", "transformers", "torch")}

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict:
        """The tokens of a text, or of a conversation as the model sees it."""
        service.check_model(body.model)
        tokens = await asyncio.to_thread(_tokenize, service, body)
        strings = {"token_strs": service.tokenizer.convert_ids_to_tokens(tokens)} if body.return_token_strs else {}
        return {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens, **strings}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict:
        service.check_model(body.model)
        size = service.engine.engine.model.vocab_size
        for token in body.tokens:
            if not 0 <= token < size:
                raise Refused(f"tokens: {token} is outside the vocabulary of {size}", param="tokens", code="invalid_value")
        text = service.tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
        return {"prompt": text}

    return routes


def _tokenize(service: Service, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise Refused("exactly one of prompt and messages must be given", param="prompt", code="invalid_value")
    if body.prompt is not None:
        return service.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens).input_ids
    return chat_tokens(
        service,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        chat_template_kwargs=body.chat_template_kwargs,
    )
