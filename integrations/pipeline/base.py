"""What pipelines over the engine share: the model is patched, and calls of `generate` run side by side.

Inputs, options and results are handled by transformers' own pipeline, unchanged. Only where it would call `generate` for
one input after another, the calls are started ahead and run in the engine together.
"""

from __future__ import annotations

import copy
from collections.abc import Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from ...base.config import EngineConfig
from ...base.errors import EngineClosed, InvalidArgument
from ...hf.generation import start_generate
from ...hf.patch import engine_of, is_patched, patch, patch_of, unpatch
from .ahead import Ahead, Started


class PagedPipeline:
    """In front of a transformers pipeline that generates text. The pipelines that users see say what it does for them."""

    def __init__(self, *args, engine_config: EngineConfig | None = None, **kwargs):
        if engine_config is not None and not isinstance(engine_config, EngineConfig):
            raise InvalidArgument(f"engine_config must be an EngineConfig, got {type(engine_config).__name__}")
        super().__init__(*args, **kwargs)
        self._engine_config = engine_config
        self._patched_here = self._closed = False
        if is_patched(self.model) and engine_config not in (None, patch_of(self.model).config):
            raise InvalidArgument(
                "engine_config: this model is patched with another configuration; leave engine_config out, or call "
                "hf_paged.patch(model, engine_config) first"
            )
        self._ensure_patched()

    def _ensure_patched(self) -> None:
        if self._closed:
            raise EngineClosed("the pipeline is closed")
        if not is_patched(self.model):  # also where a copy, or another pipeline's end, made it plain again
            patch(self.model, self._engine_config, tokenizer=getattr(self, "processor", None) or self.tokenizer)
            self._patched_here = True

    def close(self) -> None:
        """Unpatch the model if this pipeline patched it; calls are refused from now on. Closing twice is fine."""
        self._closed = True
        if self._patched_here and is_patched(self.model):
            unpatch(self.model)
        self._patched_here = False

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _sanitize_parameters(self, progress=None, **parameters):
        preprocess, forward, postprocess = super()._sanitize_parameters(**parameters)
        if progress is not None:
            forward["progress"] = bool(progress)
        return preprocess, forward, postprocess

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        forward_params = dict(forward_params)
        with _bar(1, forward_params.pop("progress", False)) as bar:
            outputs = super().run_single(inputs, preprocess_params, forward_params, postprocess_params)
            bar.update()
        return outputs

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ):
        forward_params = dict(forward_params)
        progress = forward_params.pop("progress", False)
        results = super().get_iterator(
            inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
        )
        length = len(inputs) if isinstance(inputs, Sized) else None
        alone = length is not None and length <= batch_size
        forwards = results.loader  # it applies `forward` to what a DataLoader collates
        forwards.loader = Ahead(
            forwards.loader,
            partial(self._start, alone, forward_params),
            most_rows=engine_of(self.model).config.max_num_seqs,
            batch_size=batch_size,
            whole=isinstance(inputs, list),
            bar=partial(_bar, length, progress),
        )
        forwards.infer = self._finish
        return results

    def _start(self, alone: bool, forward_params: dict, model_inputs) -> Started:
        """`forward` as far as its `generate` is started."""
        self._ensure_patched()  # results are read later than they were asked for
        started = Started(model_inputs)

        def begin(**kwargs):
            started.take(start_generate(self.model, alone=alone, **kwargs))
            return torch.empty((started.num_prompts, 0), dtype=torch.int64)  # `forward` wants a result

        self._forward_with(begin, forward_params, model_inputs)
        return started

    def _finish(self, started: Started, **forward_params):
        """`forward` again, now with the result of its `generate`."""
        return self._forward_with(lambda **kwargs: started.result, forward_params, started.model_inputs)

    def _forward_with(self, generate, forward_params: dict, model_inputs):
        twin = copy.copy(self)
        twin.model = _StandIn(self.model, generate)
        return twin.forward(model_inputs, **forward_params)


@dataclass
class _StandIn:
    """The model as a pipeline's `_forward` sees it, with a `generate` of ours."""

    model: Any
    generate: Any

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def _bar(total: int | None, progress: bool):
    return tqdm(total=total, disable=not progress, unit="prompt", dynamic_ncols=True)
