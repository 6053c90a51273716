"""One engine, as an actor of Ray Serve: the app of `integrations.openai` over it, asked by the fronts."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from prometheus_client import generate_latest
from ray import serve
from starlette.types import Message

from ... import engine_of, unpatch
from ...engine.async_engine import AsyncEngine
from ..openai.app import create_app
from ..openai.serve import few_pauses
from .exchange import Call, answers
from .loading import load
from .options import Options
from .ranks import Ranks
from .scaling import SEQUENCES

LOOK = 0.5  # seconds from one look at the engine to the next
LAST_SECONDS = 2.0  # for requests to be told why they end, when the engine has died


class Replica:
    """The deployment of engines.

    Args:
        options: see Options.
        api_keys: of the server.
    """

    async def __init__(self, options: Options, api_keys: tuple[str, ...]):
        self._name = serve.get_replica_context().replica_id.unique_id
        self._scopes = contextlib.AsyncExitStack()
        self._scopes.enter_context(few_pauses())
        self._ranks = Ranks(options) if options.tensor_parallel_size > 1 else None
        self._model = await self._loaded(options)
        self._engine = AsyncEngine(engine_of(self._model))
        settings = options.settings(api_keys=api_keys, response_tag=self._name)
        self._app = create_app(self._engine, settings)
        self._service = self._app.state.service
        await self._scopes.enter_async_context(self._app.router.lifespan_context(self._app))
        self._adapters: dict[str, str] = {}
        self._problem: str | None = None
        self._ending = False
        self._watch = asyncio.create_task(self._until_it_dies())

    async def _loaded(self, options: Options):
        if self._ranks is None:
            return await asyncio.to_thread(load, options, 0)
        self._ranks.join()
        loaded = asyncio.create_task(asyncio.to_thread(load, options, 0))
        lost = asyncio.create_task(self._ranks.until_one_ends())
        await asyncio.wait({loaded, lost}, return_when=asyncio.FIRST_COMPLETED)
        if not loaded.done():
            raise RuntimeError(f"the model cannot be loaded: {lost.result()}")
        lost.cancel()
        return loaded.result()

    async def _until_it_dies(self) -> None:
        """An engine that has ended cannot begin again: the process ends, so that a new one comes for it."""
        while self._engine.running:
            await asyncio.sleep(LOOK)
        if self._ending:
            return
        self._problem = "the engine has ended"
        await asyncio.sleep(LAST_SECONDS)
        os._exit(1)

    async def answer(self, call: Call) -> AsyncIterator[list[Message]]:
        """The app's answer to a request, in parts."""
        header = (b"x-replica", self._name.encode())
        async with contextlib.aclosing(answers(self._app, call)) as parts:
            async for messages in parts:
                for message in messages:
                    if message["type"] == "http.response.start":
                        message["headers"] = [*message.get("headers", ()), header]
                yield messages

    async def reconfigure(self, config: dict) -> None:
        """Load and unload adapters, so that they are those of `config`; Ray Serve calls it on all replicas.

        Raises ValueError for other names than "adapters", and what loading raises.
        """
        unknown = config.keys() - {"adapters"}
        if unknown:
            raise ValueError(f"user_config: {sorted(unknown)[0]} is not a field; there is adapters")
        wanted = config.get("adapters", {})
        for name, folder in list(self._adapters.items()):
            if wanted.get(name) != folder:
                await self._engine.unload_adapter(name)
                del self._adapters[name]
        for name, folder in wanted.items():
            if name not in self._adapters:
                await self._engine.load_adapter(name, folder)
                self._adapters[name] = folder

    async def taking(self) -> bool:
        """Whether requests are taken."""
        return self._service.taking

    async def numbers(self) -> tuple[str, str]:
        """The replica's name and its page for Prometheus."""
        page = await asyncio.to_thread(generate_latest, self._service.metrics.registry)
        return self._name, page.decode()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        stats = await asyncio.to_thread(self._engine.engine.stats)
        return {SEQUENCES: stats["running"] + stats["waiting"]}

    async def check_health(self) -> None:
        """Raises RuntimeError if the engine has ended, so that Ray Serve replaces the replica."""
        if self._problem is not None or not self._engine.running:
            raise RuntimeError(self._problem or "the engine has ended")

    async def __del__(self):
        """Ray Serve calls it when running requests have come to their end, or their grace to its own."""
        self._ending = True
        await self._scopes.aclose()
        await self._engine.close()
        await asyncio.to_thread(unpatch, self._model)
        if self._ranks is not None:
            await self._ranks.ended(LAST_SECONDS)
