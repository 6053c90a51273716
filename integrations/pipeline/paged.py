"""The pipeline itself: transformers' TextGenerationPipeline, its prompts decoded together.

Prompts, chats, tokenization, options and results are handled by transformers, unchanged. Only where it would call
`generate` for one prompt after another, the calls are started ahead and run in the engine side by side.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.pipelines.text_generation import TextGenerationPipeline
from transformers.utils.chat_template_utils import Chat

from ...base.config import EngineConfig
from ...base.errors import EngineClosed, InvalidArgument, UnsupportedOption
from ...engine.text import IncrementalDetokenizer
from ...hf.generation import start_generate
from ...hf.patch import engine_of, is_patched, patch, patch_of, unpatch
from .ahead import Ahead, Started

# What shapes a call's result has no meaning in a stream of text.
_NOT_IN_STREAM = (
    *("return_full_text", "return_tensors", "return_text", "return_type"),
    *("clean_up_tokenization_spaces", "progress", "streamer"),
)


class PagedTextGenerationPipeline(TextGenerationPipeline):
    """A TextGenerationPipeline whose prompts are decoded by hf_paged's engine, side by side.

    Arguments, calls and results are those of TextGenerationPipeline, and so are the tokens (when sampling: for a single
    prompt; several have the same distribution). In addition:

    - A list goes to the engine as a whole. Generators, other iterators and datasets are read ahead, by at most four
      times the engine's `max_num_seqs` prompts, and their results come in order; with EngineConfig(max_num_seqs=1) one
      prompt runs after the other. With `batch_size`, batches are padded as in transformers, and several run at once.
    - `pipe(prompts, progress=True)` shows a progress bar.
    - `pipe.stream(prompt)` yields the text as it is made.
    - The model is patched (see `hf_paged.patch`) until `close`, or the end of a `with` block, takes that back.

    An error in one of several prompts carries a note that says which one; the results of a generator or a dataset can
    be read on after it. Prompts run one after another, as in transformers, with a `streamer`, with processors or criteria
    of your own (they may have a memory), and where decoding is other than greedy search or sampling without scores.

    Args:
        engine_config: an EngineConfig for the model's engine; default EngineConfig(), or that of a patched model.

    Raises:
        UnsupportedModel: see `hf_paged.patch`.
        InvalidArgument: `engine_config` is none, or differs from that of a model which is patched already.
    """

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
            patch(self.model, self._engine_config, tokenizer=self.tokenizer)
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

    def __call__(self, text_inputs, **kwargs):
        """Complete the prompt(s), as TextGenerationPipeline does; with `progress=True` behind a progress bar."""
        self._ensure_patched()
        if isinstance(text_inputs, list) and not text_inputs:
            return []
        if isinstance(text_inputs, Iterator) and not isinstance(text_inputs, types.GeneratorType):
            text_inputs = (item for item in text_inputs)  # the one kind of iterator that transformers takes
        return super().__call__(text_inputs, **kwargs)

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

    def stream(self, text_inputs, **kwargs) -> Iterator[str]:
        """Yield the new text of one prompt or chat piece by piece, as it is made.

        Together the pieces are the text of `pipe(text_inputs, return_full_text=False, **kwargs)`, spaces not cleaned up.
        What runs one prompt after another (see the class) gives one piece, at its end. Leaving the loop ends the request.

        Args:
            text_inputs: a string, or a chat as a list of messages.
            kwargs: as of a call, except what shapes its result.

        Raises:
            InvalidArgument, UnsupportedOption: an argument is wrong or has no meaning here, by name.
        """
        self._ensure_patched()
        for name in _NOT_IN_STREAM:
            if {"streamer": self._forward_params.get("streamer"), **kwargs}.get(name):
                raise UnsupportedOption(f"{name} has no meaning for stream, which yields pieces of new text")
        if isinstance(text_inputs, (list, tuple)) and text_inputs and isinstance(text_inputs[0], dict):
            text_inputs = Chat(text_inputs)
        elif not isinstance(text_inputs, str):
            raise InvalidArgument(
                f"text_inputs: stream takes a string or a chat (a list of messages), got {type(text_inputs).__name__}"
            )
        return self._pieces(text_inputs, *self._sanitize_parameters(**kwargs))

    def _pieces(self, prompt, preprocess_params: dict, forward_params: dict, postprocess_params: dict) -> Iterator[str]:
        forward_params = {**self._forward_params, **forward_params}
        forward_params.pop("progress", None)
        model_inputs = self.preprocess(prompt, **{**self._preprocess_params, **preprocess_params})
        detokenizer = self._detokenizer({**self._postprocess_params, **postprocess_params})
        shown = model_inputs["input_ids"].shape[1]
        started = self._start(True, forward_params, model_inputs)
        try:
            if started.num_rows != 1:
                raise UnsupportedOption("num_return_sequences: stream shows one sequence; make it 1")
            while True:
                done = started.settle()
                if started.error is not None:
                    raise started.error
                tokens = started.first_row()
                yield from filter(None, map(detokenizer.append, tokens[shown:]))
                if done:
                    break
                shown = len(tokens)
                started.call.engine.step()
        finally:
            started.abandon()
        if piece := detokenizer.flush():
            yield piece

    def _detokenizer(self, postprocess_params: dict) -> IncrementalDetokenizer:
        skip = postprocess_params.get("skip_special_tokens") is not False
        if getattr(self.tokenizer, "response_template", None):
            skip = False
        return IncrementalDetokenizer(self.tokenizer, (), skip_special_tokens=skip)


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
