"""The app in a server process of its own."""

from __future__ import annotations

import gc

import uvicorn
from fastapi import FastAPI

HEADER_BYTES = 64 * 1024  # of a request line and its headers; more closes the connection


def serve(app: FastAPI, *, host: str, port: int, grace: float) -> None:
    """Serve until SIGINT or SIGTERM, then let what runs come to its end.

    Args:
        grace: seconds that running requests get for it; then they are cut off.
    """
    gc.collect()
    gc.freeze()  # the model and its libraries are here to stay: every full collection would look through them, for long
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=grace,
        access_log=False,
        server_header=False,
    )
    uvicorn.Server(config).run()
