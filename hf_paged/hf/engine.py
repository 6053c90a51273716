"""The public Engine: a BatchEngine over a transformers model, patching it if need be."""

from __future__ import annotations

import torch

from ..base.config import EngineConfig
from ..base.errors import InvalidArgument
from ..engine.engine import BatchEngine
from .draft import check_draft, draft_config
from .explain import explain_patch
from .patch import Patch, engine_of, is_patched, patch, patch_of, unpatch

LEAST_MEMORY = 1  # bytes; an engine takes a block a layer whatever it may


class Engine(BatchEngine):
    """Continuous batching over a transformers model; `generate`, `embed`, `score`, `classify`, or `add` and `step`.

    A model that is not patched yet is patched, and unpatched when the engine closes. A patched model has one engine:
    a second one is refused while the first is open.

    Args:
        model: a decoder-only transformers model, patched or not.
        tokenizer: its tokenizer, or for images its processor; None if prompts and outputs are token ids.
        config: an EngineConfig; default the patched model's own, or EngineConfig().
        draft_model: see `patch`; default the one the patched model was given.

    Raises:
        UnsupportedModel: see `patch`.
        InvalidArgument: the model has an open engine, or an argument is wrong.
    """

    _patched_here: torch.nn.Module | None = None
    _draft_engine: Engine | None = None
    _borrowers = 0  # open engines that made this one for their draft model

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer=None,
        config: EngineConfig | None = None,
        *,
        draft_model: torch.nn.Module | None = None,
    ):
        if not is_patched(model):
            patch(model, config, tokenizer=tokenizer, draft_model=draft_model)
            self._patched_here = model
        elif draft_model is not None:
            check_draft(model, draft_model)
        undo = patch_of(model)
        for option in ("fuse", "exact"):
            if config is not None and getattr(config, option) != getattr(undo.config, option):
                raise InvalidArgument(f"{option} is decided when the model is patched; pass it to hf_paged.patch")
        try:
            undo.adopt(self)
            self._open(undo, tokenizer, config or undo.config, draft_model)
        except BaseException:
            undo.forget(self)
            if self._patched_here is not None:
                unpatch(model)
            raise

    @classmethod
    def _for_patch(cls, undo: Patch) -> Engine:
        engine = cls.__new__(cls)
        engine._open(undo, None, undo.config, None)
        return engine

    def _open(self, undo: Patch, tokenizer, config: EngineConfig, draft_model: torch.nn.Module | None) -> None:
        tokenizer = undo.tokenizer if tokenizer is None else tokenizer
        if tokenizer is not None and not callable(tokenizer):
            raise InvalidArgument(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        self._patch, self.config = undo, config
        self._check_strict()
        if draft_model is None and config.speculation and config.speculation.method == "draft":
            draft_model = undo.draft_model
        config = draft_config(config, draft_model)
        if draft_model is not None:
            self._draft_engine = _borrow(draft_model, config)
        try:
            super().__init__(undo.adapter, tokenizer, config, self._draft_engine)
            self._share_memory()
        except BaseException:
            self._return_draft_engine()
            raise

    def _share_memory(self) -> None:
        """On CUDA this engine took all that is left: give a draft engine made for it enough for as many tokens."""
        draft = self._draft_engine
        if draft is None or draft.config.kv_cache_memory != LEAST_MEMORY:
            return
        own, its = (engine._cache.bytes_per_token for engine in (self, draft))
        tokens = self.stats()["kv_bytes_allocated"] / (own + its)
        self.resize_kv_cache(int(tokens * own))
        draft.resize_kv_cache(int(tokens * its))

    def prepare(self, *args, **options):
        self._check_strict()  # since the model was patched, hooks and replaced modules may have come
        return super().prepare(*args, **options)

    def adapter_inside(self, name: str) -> str:
        """The name in this engine of an adapter of the model's own PEFT modules, which is loaded if it was not."""
        with self._between_steps():
            return self.model.adapters.inside(name, self.config, self.model.take_adapter)

    def hold(self, *args, **options):
        self._check_strict()
        return super().hold(*args, **options)

    def _check_strict(self) -> None:
        if self.config.strict:
            explain_patch(self._patch.adapter.module, self._patch, self.config).raise_on_fallback()

    def close(self) -> None:
        """End what still runs, free the KV cache, and unpatch the model if this engine patched it."""
        super().close()
        self._return_draft_engine()
        model, self._patched_here = self._patched_here, None
        if model is not None and is_patched(model):
            unpatch(model)

    def _return_draft_engine(self) -> None:
        engine, self._draft_engine = self._draft_engine, None
        if engine is not None and engine._borrowers:
            engine._borrowers -= 1
            if not engine._borrowers:
                engine.close()


def _borrow(draft_model: torch.nn.Module, config: EngineConfig) -> Engine:
    """The draft model's engine: the one it has, or one that lives until the last that guesses with it closes."""
    if is_patched(draft_model):
        engine = engine_of(draft_model)
        engine._borrowers += bool(engine._borrowers)
        return engine
    own = config.replace(speculation=None, kv_dtype=None, max_model_len=None, max_queue=None, offload=None)
    if not isinstance(own.kv_cache_memory, int) and next(draft_model.parameters()).is_cuda:
        own = own.replace(kv_cache_memory=LEAST_MEMORY)  # until it is known what there is to share
    engine = Engine(draft_model, config=own)
    engine._borrowers = 1
    return engine
