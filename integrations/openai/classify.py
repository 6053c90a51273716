"""/classify, as vLLM's."""

from __future__ import annotations

import time
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, StrictBool, StrictInt, StrictStr

from ...base.tasks import ClassificationOutput, ClassifyParams
from .body import strict_router
from .described import GENERATES, answers
from .protocol import Many
from .service import Service, as_list, while_connected
from .tasks import TaskRequest, TaskRun, Tokens


class ClassificationRequest(TaskRequest):
    """
    Attributes:
        use_activation: False gives the head's logits; None or True, probabilities as the model's config says.
    """

    input: StrictStr | Many[StrictStr] | Many[StrictInt] | Many[Many[StrictInt]]
    use_activation: StrictBool | None = None


class Class(BaseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classes(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Class]
    usage: Tokens


def router(service: Service) -> APIRouter:
    routes = strict_router()
    told = {"response_model": None, "responses": answers(*GENERATES, whole=Classes)}

    @routes.post("/v1/classify", **told)
    @routes.post("/classify", **told)
    async def classify(body: ClassificationRequest, request: Request) -> dict:
        """The label of each input."""
        return await while_connected(request, _classify(service, body))

    return routes


async def _classify(service: Service, body: ClassificationRequest) -> dict:
    run = TaskRun(service, body, "classify")
    params = ClassifyParams(activation="none" if body.use_activation is False else None)
    outputs: list[ClassificationOutput] = await run.results(as_list(body.input), params, "input")
    data = [
        {"index": index, "label": output.label, "probs": output.scores.tolist(), "num_classes": len(output.scores)}
        for index, output in enumerate(outputs)
    ]
    head = {"id": run.id, "object": "list", "created": int(time.time()), "model": run.model}
    return {**head, "data": data, "usage": run.usage.as_dict()}
