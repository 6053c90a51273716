"""An OpenAI-compatible FastAPI app over an engine: `create_app`. Needs `pip install hf_paged[server]`."""

from .app import create_app
from .settings import Limits, Settings

__all__ = ["Limits", "Settings", "create_app"]
