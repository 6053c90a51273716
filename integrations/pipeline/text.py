"""The pipeline for text: transformers' TextGenerationPipeline, its prompts decoded together."""

from __future__ import annotations

import types
from collections.abc import Iterator

from transformers.pipelines.text_generation import TextGenerationPipeline
from transformers.utils.chat_template_utils import Chat

from ...base.errors import InvalidArgument, UnsupportedOption
from ...engine.text import IncrementalDetokenizer
from .base import PagedPipeline

# What shapes a call's result has no meaning in a stream of text.
_NOT_IN_STREAM = (
    *("return_full_text", "return_tensors", "return_text", "return_type"),
    *("clean_up_tokenization_spaces", "progress", "streamer"),
)


class PagedTextGenerationPipeline(PagedPipeline, TextGenerationPipeline):
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

    def __call__(self, text_inputs, **kwargs):
        """Complete the prompt(s), as TextGenerationPipeline does; with `progress=True` behind a progress bar."""
        self._ensure_patched()
        if isinstance(text_inputs, list) and not text_inputs:
            return []
        if isinstance(text_inputs, Iterator) and not isinstance(text_inputs, types.GeneratorType):
            text_inputs = (item for item in text_inputs)  # the one kind of iterator that transformers takes
        return super().__call__(text_inputs, **kwargs)

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
