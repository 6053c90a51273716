"""`pipeline(task, model=..., backend="paged")`: transformers' own pipelines over hf_paged's engine.

The tasks are "text-generation" and "image-text-to-text". Importing this package is what makes `pipeline` know `backend=`;
`import hf_paged` sees to it as soon as transformers' pipelines are imported. The pipelines themselves, and the engine with
them, are loaded on first use.
"""

from __future__ import annotations

import importlib

from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline
from transformers.pipelines.text_generation import TextGenerationPipeline

from ...base.errors import InvalidArgument

__all__ = ["PagedImageTextToTextPipeline", "PagedTextGenerationPipeline"]
_TASKS = {"image-text-to-text": ImageTextToTextPipeline, "text-generation": TextGenerationPipeline}
_FILES = {"PagedImageTextToTextPipeline": ".images", "PagedTextGenerationPipeline": ".text"}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FILES[name], __name__), name)


def _dispatch(stock: type) -> type:
    """What transformers' registry of tasks is to hold: makes stock's pipeline, or ours where `backend` asks for it."""

    class Dispatch(stock):
        def __new__(cls, *args, backend: str | None = None, **kwargs):
            if cls is not Dispatch:  # somebody's own pipeline, over the class found in the registry
                return super().__new__(cls)
            if backend == "paged":
                return __getattr__(f"Paged{stock.__name__}")(*args, **kwargs)
            if backend is not None:
                raise InvalidArgument(f"backend must be 'paged', or left out for transformers' own; got {backend!r}")
            if "engine_config" in kwargs:
                raise InvalidArgument("engine_config needs backend='paged'")
            return stock(*args, **kwargs)

    return Dispatch


def _register() -> None:
    """Put dispatchers into the registry, unless somebody's own class is there."""
    for name, stock in _TASKS.items():
        task = PIPELINE_REGISTRY.supported_tasks.get(name, {})
        if task.get("impl") in (stock, f"{stock.__module__}.{stock.__qualname__}"):  # a class, or its name in newer versions
            task["impl"] = _dispatch(stock)


_register()
