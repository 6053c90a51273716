"""/v1/score and /v1/rerank, as vLLM's, Jina's and Cohere's: how well texts fit each other.

A model that classifies with a single label says so of every pair (a cross-encoder); any other by the cosine of two
embeddings.
"""

from __future__ import annotations

import time
from typing import Annotated, Literal

import numpy
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr

from ...base.tasks import ClassifyParams, EmbedParams
from .body import strict_router
from .described import GENERATES, answers
from .errors import Refused
from .protocol import Many, Strict
from .service import Service, while_connected
from .tasks import TaskRequest, TaskRun, Tokens


class PairRequest(TaskRequest):
    """
    Attributes:
        use_activation: of cross-encoders: False gives the head's logits.
        pooling: of all others' embeddings; see EmbedParams.
    """

    use_activation: StrictBool | None = None
    pooling: Literal["mean", "last", "cls"] | None = None


class ScoreRequest(PairRequest):
    text_1: StrictStr | Many[StrictStr]
    text_2: StrictStr | Many[StrictStr]


class Document(Strict):
    text: StrictStr


class RerankRequest(PairRequest):
    query: StrictStr
    documents: Many[StrictStr | Document]
    top_n: Annotated[StrictInt, Field(ge=0)] | None = None
    return_documents: StrictBool = True


class Score(BaseModel):
    index: int
    object: Literal["score"]
    score: float


class Scores(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: Tokens


class Rank(BaseModel):
    index: int
    document: Document | None = None
    relevance_score: float


class Ranks(BaseModel):
    id: str
    model: str
    results: list[Rank]
    usage: Tokens


def router(service: Service) -> APIRouter:
    routes = strict_router()
    scores = {"response_model": None, "responses": answers(*GENERATES, whole=Scores)}
    ranks = {"response_model": None, "responses": answers(*GENERATES, whole=Ranks)}

    @routes.post("/v1/score", **scores)
    @routes.post("/score", **scores)
    async def score(body: ScoreRequest, request: Request) -> dict:
        """How well each text_2 fits its text_1, or all the one there is."""
        return await while_connected(request, _score(service, body))

    @routes.post("/v1/rerank", **ranks)
    @routes.post("/v2/rerank", **ranks)
    @routes.post("/rerank", **ranks)
    async def rerank(body: RerankRequest, request: Request) -> dict:
        """Documents by how well they fit a query, the best first."""
        return await while_connected(request, _rerank(service, body))

    return routes


async def _score(service: Service, body: ScoreRequest) -> dict:
    second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    first = [body.text_1] * len(second) if isinstance(body.text_1, str) else body.text_1
    if len(first) != len(second):
        raise Refused(
            f"text_1 has {len(first)} texts, text_2 {len(second)}; they must be as many, or text_1 one",
            param="text_2",
            code="invalid_value",
        )
    run = TaskRun(service, body, "score")
    scores = await _scores(service, body, run, first, second, "text_2")
    return {
        "id": run.id,
        "object": "list",
        "created": int(time.time()),
        "model": run.model,
        "data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)],
        "usage": run.usage.as_dict(),
    }


async def _rerank(service: Service, body: RerankRequest) -> dict:
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    run = TaskRun(service, body, "rerank")
    scores = await _scores(service, body, run, [body.query] * len(texts), texts, "documents")
    best = sorted(range(len(texts)), key=lambda place: (-scores[place], place))
    if body.top_n:
        best = best[: body.top_n]
    results = []
    for place in best:
        document = {"document": {"text": texts[place]}} if body.return_documents else {}
        results.append({"index": place, **document, "relevance_score": scores[place]})
    usage = run.usage.as_dict()
    return {"id": run.id, "model": run.model, "usage": usage, "results": results}


async def _scores(
    service: Service, body: PairRequest, run: TaskRun, first: list[str], second: list[str], field: str
) -> list[float]:
    """One for each pair."""
    labels = service.engine.engine.model.labels
    if len(labels) > 1:
        raise Refused(
            f"model: it tells {len(labels)} labels apart, so it cannot score pairs; /classify names the labels",
            param="model",
            code="unsupported",
        )
    if labels:
        return await _compared(body, run, first, second, field)
    if body.use_activation is not None:
        raise Refused(
            "use_activation: this model compares embeddings, which have none", param="use_activation", code="unsupported"
        )
    texts = list(dict.fromkeys([*first, *second]))  # a query stands before every document
    outputs = await run.results(texts, EmbedParams(pooling=body.pooling), field)
    vectors = dict(zip(texts, (output.embedding for output in outputs), strict=True))
    return [float(numpy.dot(vectors[one], vectors[other])) for one, other in zip(first, second, strict=True)]


async def _compared(body: PairRequest, run: TaskRun, first: list[str], second: list[str], field: str) -> list[float]:
    if body.pooling is not None:
        raise Refused("pooling: this model compares pairs itself", param="pooling", code="unsupported")
    params = ClassifyParams(activation="none" if body.use_activation is False else None)
    outputs = await run.results(list(zip(first, second, strict=True)), params, field)
    return [float(output.scores[0]) for output in outputs]
