"""Replicas of the engine on Ray Serve, behind one OpenAI-compatible address: `build_app`. Needs `pip install hf_paged[ray]`."""

from .build import app, build_app
from .options import Options

__all__ = ["Options", "app", "build_app"]
