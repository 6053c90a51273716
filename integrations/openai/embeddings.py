"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from typing import Literal

import numpy
from fastapi import APIRouter, Request
from openai.types import CreateEmbeddingResponse, Embedding
from openai.types.create_embedding_response import Usage
from pydantic import StrictBool, StrictInt, StrictStr

from ...base.tasks import EmbeddingOutput, EmbedParams
from .body import strict_router
from .described import GENERATES, answers
from .protocol import Many
from .service import Service, as_list, while_connected
from .tasks import TaskRequest, TaskRun, answered


class EmbeddingRequest(TaskRequest):
    input: StrictStr | Many[StrictStr] | Many[StrictInt] | Many[Many[StrictInt]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: StrictInt | None = None
    # beyond OpenAI's
    normalize: StrictBool = True
    pooling: Literal["mean", "last", "cls"] | None = None


class Vector(Embedding):
    embedding: list[float] | str  # numbers, or as base64


class Embeddings(CreateEmbeddingResponse):
    id: str
    data: list[Vector]


def router(service: Service) -> APIRouter:
    routes = strict_router()

    @routes.post("/v1/embeddings", response_model=None, responses=answers(*GENERATES, whole=Embeddings))
    async def create(body: EmbeddingRequest, request: Request):
        """One vector for each input."""
        return await while_connected(request, _embed(service, body))

    return routes


async def _embed(service: Service, body: EmbeddingRequest):
    run = TaskRun(service, body, "embd")
    params = EmbedParams(pooling=body.pooling, normalize=body.normalize, dimensions=body.dimensions)
    outputs = await run.results(as_list(body.input), params, "input")
    data = await asyncio.to_thread(_data, outputs, body.encoding_format)
    tokens = run.usage.as_dict()["prompt_tokens"]
    return await answered(
        Embeddings.model_construct(
            id=run.id,
            object="list",
            model=run.model,
            data=data,
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        )
    )


def _data(outputs: list[EmbeddingOutput], encoding: str) -> list[Vector]:
    encode = _base64 if encoding == "base64" else numpy.ndarray.tolist
    return [
        Vector.model_construct(index=index, object="embedding", embedding=encode(output.embedding))
        for index, output in enumerate(outputs)
    ]


def _base64(vector: numpy.ndarray) -> str:
    """As OpenAI's clients decode it: float32, little-endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
