"""The app: routes over one engine."""

from __future__ import annotations

from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ...base.errors import InvalidArgument
from ...engine.async_engine import AsyncEngine
from ...engine.engine import BatchEngine
from . import (
    adapters,
    chat,
    classify,
    completions,
    described,
    embeddings,
    errors,
    metrics,
    models,
    page,
    responses,
    scoring,
)
from .auth import RequireKey
from .drain import Draining
from .lag import watched_loop
from .middleware import LimitBody
from .observe import Observe, log
from .service import Service
from .settings import Settings
from .turns import TakeTurns


def create_app(
    engine: BatchEngine | AsyncEngine, settings: Settings | None = None, *, tracer_provider=None
) -> FastAPI:
    """An OpenAI-compatible app that serves the engine's model. It may be mounted in another FastAPI app.

    Args:
        engine: an engine with a tokenizer. An `Engine` is run by a thread that begins and ends with the app, and is closed
            with it; an `AsyncEngine` stays the caller's, who closes it. (An app that is mounted in another never hears of
            the other's end: give it an `AsyncEngine`.)
        tracer_provider: OpenTelemetry's, which gets a trace of every request; None: no traces.

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
        log.info("serving", extra={"fields": {"model": service.model_name, **service.dialect.names}})
        async with watched_loop(service.metrics.loop_lag.observe):
            yield
        await service.close()
        if mine:
            await running.close()
        log.info("stopped", extra={"fields": {"model": service.model_name}})

    app = FastAPI(title="hf_paged", summary=service.model_name, lifespan=lifespan)
    app.state.service = service
    errors.install(app)
    _add_layers(app, service, settings, tracer_provider)
    for part in (chat, completions, responses, embeddings, scoring, classify, models):
        app.include_router(part.router(service))
    app.include_router(metrics.router(service.metrics))
    if settings.enable_adapters:
        app.include_router(adapters.router(service))
    described.install(app, keys=bool(settings.api_keys))
    if settings.page:
        app.include_router(page.router())
    return app


def _add_layers(app: FastAPI, service: Service, settings: Settings, tracer_provider) -> None:
    """What every request passes on its way to its route: the last one first."""
    app.add_middleware(LimitBody, limit=settings.limits.body_bytes, timeout=settings.body_timeout)
    app.add_middleware(Draining, drain=service.drain)
    if settings.api_keys:
        app.add_middleware(RequireKey, keys=settings.api_keys, page=settings.page)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    tracing = None
    if tracer_provider is not None:
        from .tracing import Tracing

        tracing = Tracing(tracer_provider, service.model_name)
    app.add_middleware(
        Observe,
        metrics=service.metrics,
        model_name=service.model_name,
        log_client=settings.log_client_address,
        tracing=tracing,
    )
    app.add_middleware(TakeTurns)
