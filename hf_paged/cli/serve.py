"""`hf-paged serve`: an OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path

from .common import UserError, open_engine


def run_serve(
    host: str, port: int, grace: float, keys: list[str], key_file: Path | None, settings: dict, loading: dict
) -> None:
    """Load, patch, serve until a signal comes."""
    try:
        from hf_paged.integrations.openai import Settings, create_app
        from hf_paged.integrations.openai.auth import read_keys
        from hf_paged.integrations.openai.serve import serve
    except ImportError as error:
        raise UserError(f"hf-paged serve needs {error.name}: pip install hf_paged[server]") from None
    settings = Settings(api_keys=read_keys(keys, key_file), **settings)
    with open_engine(**loading) as (_, _, engine):
        serve(create_app(engine, settings), host=host, port=port, grace=grace)
