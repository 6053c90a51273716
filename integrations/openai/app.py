"""The app: routes over one engine."""

from __future__ import annotations

from contextlib import asynccontextmanager

from fastapi import FastAPI

from ...base.errors import InvalidArgument
from ...engine.async_engine import AsyncEngine
from ...engine.engine import BatchEngine
from . import chat, completions, errors, metrics, models, page
from .auth import RequireKey
from .middleware import LimitBody
from .service import Service
from .settings import Settings


def create_app(engine: BatchEngine | AsyncEngine, settings: Settings | None = None) -> FastAPI:
    """An OpenAI-compatible app that serves the engine's model. It may be mounted in another FastAPI app.

    Args:
        engine: an engine with a tokenizer. An `Engine` is run by a thread that begins and ends with the app, and is closed
            with it; an `AsyncEngine` stays the caller's, who closes it.

    Raises InvalidArgument if the engine has no tokenizer.
    """
    if not isinstance(engine, BatchEngine | AsyncEngine):
        raise InvalidArgument(f"engine must be an Engine or an AsyncEngine, got {type(engine).__name__}")
    settings = settings or Settings()
    mine = isinstance(engine, BatchEngine)
    running = AsyncEngine(engine) if mine else engine
    service = Service(running, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        if mine:
            await running.close()

    app = FastAPI(title="hf_paged", summary=service.model_name, lifespan=lifespan)
    app.state.service = service
    errors.install(app)
    app.add_middleware(LimitBody, limit=settings.limits.body_bytes)
    if settings.api_keys:
        app.add_middleware(RequireKey, keys=settings.api_keys, page=settings.page)
    for part in (chat, completions, models):
        app.include_router(part.router(service))
    app.include_router(metrics.router(service.metrics))
    if settings.page:
        app.include_router(page.router())
    return app
