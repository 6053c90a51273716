"""`pipeline("text-generation", model=..., backend="paged")`: transformers' own pipeline over hf_paged's engine.

Importing this package is what makes `pipeline` know `backend=`; `import hf_paged` sees to it as soon as transformers'
pipelines are imported. The pipeline itself, and the engine with it, is loaded on first use.
"""

from __future__ import annotations

from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.text_generation import TextGenerationPipeline

from ...base.errors import InvalidArgument

__all__ = ["PagedTextGenerationPipeline"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import paged

    return getattr(paged, name)


class _Dispatch(TextGenerationPipeline):
    """What transformers' registry of tasks holds: makes stock's pipeline, or ours where `backend` asks for it."""

    def __new__(cls, *args, backend: str | None = None, **kwargs):
        if cls is not _Dispatch:  # somebody's own pipeline, over the class found in the registry
            return super().__new__(cls)
        if backend == "paged":
            from .paged import PagedTextGenerationPipeline

            return PagedTextGenerationPipeline(*args, **kwargs)
        if backend is not None:
            raise InvalidArgument(f"backend must be 'paged', or left out for transformers' own; got {backend!r}")
        if "engine_config" in kwargs:
            raise InvalidArgument("engine_config needs backend='paged'")
        return TextGenerationPipeline(*args, **kwargs)


def _register() -> None:
    """Put _Dispatch into the registry, unless somebody's own class is there."""
    task = PIPELINE_REGISTRY.supported_tasks.get("text-generation", {})
    stock = (TextGenerationPipeline, f"{TextGenerationPipeline.__module__}.{TextGenerationPipeline.__qualname__}")
    if task.get("impl") in stock:  # a class, or its dotted name in newer versions
        task["impl"] = _Dispatch


_register()
