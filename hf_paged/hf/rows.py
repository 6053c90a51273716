"""Rows of a `generate` call as requests of the engine: each of its true length, each stopping on its own."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from transformers.generation import logits_process as stock
from transformers.generation import stopping_criteria as stopping

from ..base.errors import InvalidArgument
from ..base.sampling_params import SamplingParams
from ..engine.request_state import RowHooks, new_request_id
from . import row_adapters
from .paged_cache import begun
from .paged_call import cache_of
from .structured import StructuredOutputsProcessor
from .vision.rows import count_themselves, has_images, take_images

# The sampler's own forms of stock's last processors, in the order stock applies them: type and attribute.
_WARPERS = {
    "temperature": (stock.TemperatureLogitsWarper, "temperature"),
    "top_k": (stock.TopKLogitsWarper, "top_k"),
    "top_p": (stock.TopPLogitsWarper, "top_p"),
    "min_p": (stock.MinPLogitsWarper, "min_p"),
}
# Processors of stock's that treat every row by itself and keep nothing from call to call.
_BY_ROW = frozenset(
    """
    EncoderNoRepeatNGramLogitsProcessor EncoderRepetitionPenaltyLogitsProcessor EpsilonLogitsWarper EtaLogitsWarper
    ExponentialDecayLengthPenalty ForcedBOSTokenLogitsProcessor ForcedEOSTokenLogitsProcessor InfNanRemoveLogitsProcessor
    LogitNormalization MinLengthLogitsProcessor MinNewTokensLengthLogitsProcessor MinPLogitsWarper
    NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor
    SuppressTokensAtBeginLogitsProcessor SuppressTokensLogitsProcessor TemperatureLogitsWarper TopHLogitsWarper
    TopKLogitsWarper TopPLogitsWarper TypicalLogitsWarper
    """.split()
)
_CRITERIA = tuple(
    getattr(stopping, name)
    for name in ("MaxLengthCriteria", "MaxTimeCriteria", "EosTokenCriteria", "StopStringCriteria")
)


class RowCriterion(stopping.StoppingCriteria):
    """A criterion that judges every row by its tokens alone: no scores, no memory. Rows that have one still go their own way."""


def rows_suffice(input_ids, processors, criteria, config, model_kwargs, *, shift_free: bool, images) -> bool:
    """Whether rows that go their own way give what stock gives.

    Not if the caller is shown what happens at every step, brings callables (they see the whole batch in stock), or if
    finished rows go on: stock samples on where a row ended by another criterion than EOS and no EOS is set.
    `shift_free`: the model sees differences of positions only, so that it does not matter where a row is counted from.
    `images`: what the model does with images; None if it takes none.
    """
    cache = cache_of(model_kwargs)
    if (
        config.return_dict_in_generate
        or config.is_assistant
        or config.prefill_chunk_size is not None
        or model_kwargs.get("inputs_embeds") is not None
        or (cache is not None and (begun(cache) or getattr(cache, "_is_user_defined", False)))
    ):
        return False
    known = [p for p in processors if type(p).__module__ == stock.__name__ and type(p).__name__ in _BY_ROW]
    others = [p for p in processors if p not in known]
    if others and not _is_form(_split_warpers(processors)[1]):
        return False
    if not all(type(criterion) in _CRITERIA or isinstance(criterion, RowCriterion) for criterion in criteria):
        return False
    if any(len(getattr(p, "encoder_input_ids", input_ids)) != len(input_ids) for p in processors):
        return False  # encoder_repetition_penalty of several rows per prompt: transformers 5.17 penalises only some
    max_new, eos, rest = _split_criteria(criteria, input_ids.shape[1])
    if others and (others[0].used or others[0].eos_token_ids != eos):
        return False
    if max_new is None or (len(input_ids) > 1 and rest and not eos):
        return False
    padding = left_padding(input_ids, model_kwargs.get("attention_mask"))
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() == 3:
        return images is not None and count_themselves(images, input_ids, padding, positions)
    return (shift_free and positions is None) or _counts_itself(positions, padding, input_ids)


def left_padding(input_ids, mask) -> list[int]:
    """Padding columns before each row's prompt, from its attention mask."""
    if mask is None:
        return [0] * len(input_ids)
    if mask.shape != input_ids.shape:
        raise InvalidArgument(f"attention_mask has shape {list(mask.shape)}, input_ids {list(input_ids.shape)}")
    return (mask == 0).sum(-1).tolist()


def _counts_itself(positions, padding: list[int], input_ids) -> bool:
    """Whether `positions` [B or 1, L] are each row's own count from 0 (padding may have any)."""
    if positions is None:
        return not any(padding)
    own = torch.arange(input_ids.shape[1])[None] - torch.tensor(padding)[:, None]
    if positions.shape[-1] != input_ids.shape[1]:
        return False
    return bool(((positions.cpu() == own) | (own < 0)).all())


class RowGeneration:
    """One call of `generate`: rows in, engine, rows out."""

    def __init__(self, model, input_ids, processors, criteria, config, model_kwargs):
        self.engine = model._hf_paged.engine()
        self.config = config
        self.input_ids = input_ids
        self.batch, self.width = input_ids.shape
        self.padding = left_padding(input_ids, model_kwargs.get("attention_mask"))
        self.pad = None if config._pad_token_tensor is None else int(config._pad_token_tensor)
        self.max_new, self.eos, self.row_criteria = _split_criteria(criteria, self.width)
        self.constraint = None
        self.params, self.row_processors = self._split_processors(list(processors))
        images = model._hf_paged.adapter.media
        self.media = None
        if has_images(images, model_kwargs):
            self.media = take_images(images, input_ids, self.padding, model_kwargs)
        self.tokens: list[list[int]] = [[] for _ in range(self.batch)]
        self.rows: list = []
        self.name = new_request_id()
        named = row_adapters.current()
        self.adapters = [None] * self.batch if named is None else named.of_rows(self.batch)

    def _split_processors(self, processors: list) -> tuple[SamplingParams, list]:
        """The last processors become the sampler's where it has the same; the others run on their row, in order."""
        vocab_size = self.engine.model.vocab_size  # an EOS outside of it, such as -1, never comes: stock's way to say none
        native, processors = _split_warpers(processors)
        if _is_form(processors):
            self.constraint = processors.pop().begin(self.width)
        if len(processors) == 1 and self._same_penalty(processors[0]):
            native["repetition_penalty"] = processors.pop().penalty
        if not self.config.do_sample:
            native["temperature"] = 0.0
        params = SamplingParams(
            **native,
            max_tokens=self.max_new,
            ignore_eos=True,  # EOS is among the stop tokens below
            stop_token_ids=tuple(sorted(token for token in self.eos if 0 <= token < vocab_size)),
            detokenize=False,
        )
        return params, processors

    def _same_penalty(self, processor) -> bool:
        if type(processor) is not stock.RepetitionPenaltyLogitsProcessor:
            return False
        ignored = getattr(processor, "prompt_ignore_length", None)
        ignored = ignored.tolist() if torch.is_tensor(ignored) else [ignored or 0] * self.batch
        return ignored == self.padding  # the sampler penalises exactly the row's own tokens

    def run(self, streamer):
        emitted = 0
        try:
            self.start(alone=True)
            while not self.complete():
                self.engine.step()
                emitted = self._stream(streamer, emitted)
        finally:
            self.release()
        result = self.result()
        if streamer is not None:
            self._stream(streamer, emitted)
            streamer.end()
        return result

    def start(self, *, alone: bool) -> None:
        """Submit every row; `alone` as in `generation.start_generate`."""
        try:
            for row in range(self.batch):
                self.rows.append(self._submit(row, alone and self.batch == 1))
        except BaseException:
            self.release()
            raise

    def complete(self) -> bool:
        """Whether the result is there."""
        return all(row.finished for row in self.rows) or any(row.output.error for row in self.rows)

    def release(self) -> None:
        """Take out of the engine what still runs."""
        for row in self.rows:
            self.engine.release(row)

    def abandon(self) -> None:
        """`release` for finalizers."""
        for row in self.rows:
            self.engine.abandon(row)

    def _submit(self, row: int, alone: bool):
        params = self.params
        if self.config.do_sample and not alone:
            params = replace(params, seed=int(torch.randint(2**62, ())))
        hooks = RowHooks(
            processors=self._row_processor(row),
            criteria=self._row_criterion(row),
            on_token=self.tokens[row].append,
            torch_rng=bool(self.config.do_sample) and alone,
            row=row,
            constraint=self.constraint,
        )
        ids = self.input_ids[row, self.padding[row] :].tolist()
        options = dict(request_id=f"{self.name}/{row}", adapter=self.adapters[row], hooks=hooks)
        if self.media is not None:
            options["media"] = self.media[row]
        return self.engine.submit_when_possible(ids, params, **options)

    def _row_processor(self, row: int) -> tuple:
        if not self.row_processors:
            return ()
        chain = stock.LogitsProcessorList(self._for_row(processor, row) for processor in self.row_processors)
        return (lambda token_ids, logits: chain(self._padded(row, token_ids), logits[None])[0],)

    def _for_row(self, processor, row: int):
        """The processor as it acts on this row alone, where stock's form counts rows."""
        processor = copy.copy(processor)
        if torch.is_tensor(getattr(processor, "prompt_ignore_length", None)):
            processor.prompt_ignore_length = int(processor.prompt_ignore_length[row])
        if type(processor) is stock.EncoderRepetitionPenaltyLogitsProcessor:
            processor.encoder_input_ids = processor.encoder_input_ids[row : row + 1]
        if type(processor) is stock.EncoderNoRepeatNGramLogitsProcessor:
            prompt = row * processor.batch_size // self.batch  # fewer prompts than rows: return sequences
            processor.batch_size, processor.generated_ngrams = 1, processor.generated_ngrams[prompt : prompt + 1]
        return processor

    def _row_criterion(self, row: int) -> tuple:
        if not self.row_criteria:
            return ()

        def met(token_ids) -> bool:
            ids = self._padded(row, token_ids)
            return any([bool(criterion(ids, None)) for criterion in self.row_criteria])

        return (met,)

    def _padded(self, row: int, token_ids) -> torch.Tensor:
        """[1, L] what stock would show: the row with its left padding."""
        prefix = self.input_ids[row, : self.padding[row]].tolist()
        return torch.tensor([prefix + list(token_ids)], dtype=torch.int64, device=self.input_ids.device)

    def _columns(self) -> int:
        """Generated columns that are final: every row has its token there, or has ended before."""
        running = [len(tokens) for tokens, row in zip(self.tokens, self.rows) if not row.finished]
        return min(running) if running else max(map(len, self.tokens))

    def _stream(self, streamer, emitted: int) -> int:
        if streamer is None:
            return 0
        for index in range(emitted, self._columns()):
            column = [tokens[index] if index < len(tokens) else self.pad for tokens in self.tokens]
            streamer.put(torch.tensor(column, dtype=torch.int64))
            emitted = index + 1
        return emitted

    def result(self) -> torch.Tensor:
        """[B, L] what `generate` returns, once `complete()`. Raises a row's own error."""
        for row in self.rows:
            row.raise_error()
        length = self._columns()
        rows = [tokens[:length] + [self.pad] * (length - len(tokens)) for tokens in self.tokens]
        generated = torch.tensor(rows, dtype=torch.int64, device=self.input_ids.device).reshape(self.batch, length)
        return torch.cat([self.input_ids, generated], dim=-1)


def _split_warpers(processors) -> tuple[dict, list]:
    """(the sampler's options for the last of `processors`, the others)."""
    native, rest = {}, list(processors)
    for name, (kind, attribute) in reversed(_WARPERS.items()):
        if rest and type(rest[-1]) is kind and not _keeps_more(rest[-1]):
            native[name] = getattr(rest.pop(), attribute)
    return native, rest


def _is_form(processors: list) -> bool:
    """Whether they are the one form that a request of the engine may have."""
    return len(processors) == 1 and type(processors[0]) is StructuredOutputsProcessor


def _keeps_more(warper) -> bool:
    return getattr(warper, "min_tokens_to_keep", 1) != 1


def _split_criteria(criteria, width: int) -> tuple[int | None, frozenset[int], list]:
    """Length and EOS become the engine's own (most new tokens, ids); every other criterion runs on its row."""
    max_new, eos, rest = None, frozenset(), []
    for criterion in criteria:
        if type(criterion) is stopping.MaxLengthCriteria:
            limit = criterion.max_length - width
            max_new = limit if max_new is None else min(max_new, limit)
        elif type(criterion) is stopping.EosTokenCriteria:
            eos |= frozenset(criterion.eos_token_id.tolist())
        else:
            rest.append(criterion)
    return max_new, eos, rest
