"""Adapters by name: /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM's clients know them.

Off unless `Settings.enable_adapters`: whoever may load adapters has the server read folders of its machine.
"""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import Field, StrictStr

from ...base.errors import EngineClosed, HfPagedError
from .body import strict_router
from .described import ErrorBody
from .errors import Refused
from .protocol import Strict
from .service import Service

_DONE = {"description": "Done.", "content": {"text/plain": {"schema": {"type": "string"}}}}


class LoadAdapterRequest(Strict):
    lora_name: StrictStr = Field(min_length=1, max_length=256)
    lora_path: StrictStr = Field(min_length=1, max_length=4096)


class UnloadAdapterRequest(Strict):
    lora_name: StrictStr = Field(min_length=1, max_length=256)


def router(service: Service) -> APIRouter:
    routes = strict_router(default_response_class=PlainTextResponse)
    limits = service.settings.limits

    def told(*statuses: int) -> dict:
        return {200: _DONE} | {status: {"model": ErrorBody, "description": "It was not done."} for status in statuses}

    @routes.post("/v1/load_lora_adapter", response_model=None, responses=told(400, 429, 503))
    async def load(body: LoadAdapterRequest) -> str:
        """Load a PEFT adapter from a folder of the server's. Its name is a model's name from then on."""
        if body.lora_name == service.model_name:
            raise Refused("lora_name is the model's own name", param="lora_name", code="invalid_value")
        if len(service.engine.engine.adapters) >= limits.adapters:
            message = f"{limits.adapters} adapters are loaded, which is the most there may be; unload one"
            raise Refused(message, param="lora_name", status=429, code="too_many")
        try:
            await service.engine.load_adapter(body.lora_name, body.lora_path, max_rank=limits.adapter_rank)
        except EngineClosed:
            raise
        except HfPagedError as error:
            taken = body.lora_name in service.engine.engine.adapters
            raise Refused(str(error), param="lora_name" if taken else "lora_path", code="invalid_adapter") from error
        return f"Success: LoRA adapter {body.lora_name!r} added successfully."

    @routes.post("/v1/unload_lora_adapter", response_model=None, responses=told(400, 404, 503))
    async def unload(body: UnloadAdapterRequest) -> str:
        """Forget an adapter that no unfinished request has."""
        if body.lora_name not in service.engine.engine.adapters:
            message = f"adapter {body.lora_name!r} is not loaded"
            raise Refused(message, param="lora_name", status=404, code="model_not_found")
        try:
            await service.engine.unload_adapter(body.lora_name)
        except EngineClosed:
            raise
        except HfPagedError as error:
            raise Refused(str(error), param="lora_name", code="invalid_adapter") from error
        return f"Success: LoRA adapter {body.lora_name!r} removed successfully."

    return routes
