"""`hf-paged serve`: an OpenAI-compatible server."""

from __future__ import annotations

from .common import UserError, open_engine


def run_serve(host: str, port: int, grace: float, settings: dict, loading: dict) -> None:
    """Load, patch, serve until a signal comes."""
    try:
        from hf_paged.integrations.openai import Settings, create_app
        from hf_paged.integrations.openai.serve import serve
    except ImportError as error:
        raise UserError(f"hf-paged serve needs {error.name}: pip install hf_paged[server]") from None
    settings = Settings(**settings)
    with open_engine(**loading) as (_, _, engine):
        serve(create_app(engine, settings), host=host, port=port, grace=grace)
