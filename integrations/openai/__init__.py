"""An OpenAI-compatible FastAPI app over an engine: `create_app`. Needs `pip install hf_paged[server]`."""

from .settings import Limits, Settings

__all__ = ["Limits", "Settings", "create_app"]


def __getattr__(name: str):
    """The app brings torch with it, which those who only pass requests on do without."""
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .app import create_app

    return create_app
