"""The public Engine: a BatchEngine over a transformers model, patching it if need be."""

from __future__ import annotations

import torch

from ..base.config import EngineConfig
from ..base.errors import InvalidArgument
from ..engine.engine import BatchEngine
from .explain import explain_patch
from .patch import Patch, is_patched, patch, patch_of, unpatch


class Engine(BatchEngine):
    """Continuous batching over a transformers model; `generate`, or `add` and `step`.

    A model that is not patched yet is patched, and unpatched when the engine closes. A patched model has one engine:
    a second one is refused while the first is open.

    Args:
        model: a decoder-only transformers model, patched or not.
        tokenizer: its tokenizer; None if prompts and outputs are token ids.
        config: an EngineConfig; default the patched model's own, or EngineConfig().

    Raises:
        UnsupportedModel: see `patch`.
        InvalidArgument: the model has an open engine, or an argument is wrong.
    """

    def __init__(self, model: torch.nn.Module, tokenizer=None, config: EngineConfig | None = None):
        self._patched_here = None
        if not is_patched(model):
            patch(model, config, tokenizer=tokenizer)
            self._patched_here = model
        undo = patch_of(model)
        if config is not None and config.fuse != undo.config.fuse:
            raise InvalidArgument("fuse is decided when the model is patched; pass it to hf_paged.patch")
        try:
            undo.adopt(self)
            self._open(undo, tokenizer, config or undo.config)
        except BaseException:
            undo.forget(self)
            if self._patched_here is not None:
                unpatch(model)
            raise

    @classmethod
    def _for_patch(cls, undo: Patch) -> Engine:
        engine = cls.__new__(cls)
        engine._patched_here = None
        engine._open(undo, None, undo.config)
        return engine

    def _open(self, undo: Patch, tokenizer, config: EngineConfig) -> None:
        tokenizer = undo.tokenizer if tokenizer is None else tokenizer
        if tokenizer is not None and not callable(tokenizer):
            raise InvalidArgument(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        if config.strict:
            explain_patch(undo.adapter.module, undo, config).raise_on_fallback()
        super().__init__(undo.adapter, tokenizer, config)

    def close(self) -> None:
        """End what still runs, free the KV cache, and unpatch the model if this engine patched it."""
        super().close()
        model, self._patched_here = self._patched_here, None
        if model is not None and is_patched(model):
            unpatch(model)
