"""`generate` of a patched model: stock transformers resolves the options, the engine decodes.

`GenerationMixin.generate` prepares configuration, processors and criteria as always, then looks up `_sample` on the
class. Ours turns each row of the batch into a request of its true length (left padding is taken off), lets the engine
run them beside everything else it has, and puts tokens, scores and logits back into the shapes stock returns.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation import logits_process as stock
from transformers.generation import stopping_criteria as stopping

from ..base.errors import InvalidArgument, RequestTooLarge, UnsupportedOption
from ..base.sampling_params import SamplingParams
from ..engine.request_state import RowHooks
from .swap import ATTRIBUTE, Swapped

# The sampler's own forms of stock's last processors, in the order stock applies them: type and attribute.
_WARPERS = {
    "temperature": (stock.TemperatureLogitsWarper, "temperature"),
    "top_k": (stock.TopKLogitsWarper, "top_k"),
    "top_p": (stock.TopPLogitsWarper, "top_p"),
    "min_p": (stock.MinPLogitsWarper, "min_p"),
}
_REFUSED_PROCESSORS = {  # they look at more than one row's ids and scores
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "WatermarkLogitsProcessor": "watermarking_config",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
}
CACHE_NAMES = ("cache", "past_key_values")  # what `generate` calls its Cache: from transformers 5.24 on, and before
_HOW = "is not supported on a patched model; call hf_paged.unpatch(model) first"


class PagedMixin(Swapped):
    """Decoding methods of a patched model. `self._hf_paged` is its Patch."""

    def generate(self, *args, **kwargs):
        with _starting(None):  # a `generate` inside a started one is its own
            return self._generate(*args, **kwargs)

    def _generate(self, *args, **kwargs):
        for name in ("custom_generate", "cache_config", "compile_config", "continuous_batching_config"):
            if kwargs.get(name) is not None:
                raise UnsupportedOption(f"{name} {_HOW}")
        if kwargs.get("cache_implementation") is not None:
            raise UnsupportedOption("cache_implementation: a patched model keeps its keys and values in pages")
        return super().generate(*args, **kwargs)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus: bool = False,
        streamer=None,
        **model_kwargs,
    ):
        if torch.is_autocast_enabled(self.device.type):
            raise UnsupportedOption("torch.autocast: a patched model runs in its own dtype; load it in the one you want")
        _refuse_unsupported(generation_config, model_kwargs, synced_gpus)
        call = GenerateCall(self, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        start = _start.get()
        if start is None:
            return call.run(streamer)
        call.start(alone=start.alone)
        return call

    def _beam_search(self, *args, **kwargs):
        raise UnsupportedOption(f"num_beams {_HOW}")

    def _assisted_decoding(self, *args, **kwargs):
        raise UnsupportedOption(f"assistant_model / prompt_lookup_num_tokens {_HOW}")

    def generate_batch(self, *args, **kwargs):
        raise UnsupportedOption(f"generate_batch {_HOW}, or use hf_paged.engine_of(model).generate")

    def _apply(self, fn, recurse=True):
        """`to`, `half`, `cuda`, ...: a model that changes device or dtype is patched anew for what it became."""
        before = next(self.parameters())
        before = before.device, before.dtype
        result = super()._apply(fn, recurse)
        after = next(self.parameters())
        if (after.device, after.dtype) != before:
            self._hf_paged.renew(self)
        return result


def _refuse_unsupported(config, model_kwargs, synced_gpus) -> None:
    """Raise UnsupportedOption, by name, for every option whose effect the engine would not reproduce."""
    cache = next((model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None), None)
    returns = config.return_dict_in_generate
    refused = {
        "synced_gpus": synced_gpus,
        "output_attentions": returns and config.output_attentions,
        "output_hidden_states": returns and config.output_hidden_states,
        "inputs_embeds": model_kwargs.get("inputs_embeds") is not None,
        "use_mtp": getattr(config, "use_mtp", None),
        "is_assistant": config.is_assistant,
        "prefill_chunk_size": config.prefill_chunk_size,
        "cache_implementation": config.cache_implementation,
        "past_key_values": cache is not None
        and (cache.get_seq_length() > 0 or getattr(cache, "_is_user_defined", False)),
    }
    known = {"attention_mask", "position_ids", "logits_to_keep", "use_cache", "inputs_embeds", "tokenizer", *CACHE_NAMES}
    refused |= {name: True for name, value in model_kwargs.items() if name not in known and value is not None}
    for name, used in refused.items():
        if used:
            raise UnsupportedOption(f"{name} {_HOW}")


@dataclass(frozen=True)
class _Start:
    alone: bool


_start: ContextVar[_Start | None] = ContextVar("hf_paged_start", default=None)


@contextmanager
def _starting(start: _Start | None):
    token = _start.set(start)
    try:
        yield
    finally:
        _start.reset(token)


def start_generate(model, *, alone: bool = False, **kwargs):
    """`model.generate(**kwargs)` of a patched model, up to where its rows are in the engine.

    Returns the GenerateCall, for the caller to step and collect beside others; or the result itself where decoding is
    not a matter of independent rows (beam search, an assistant model) and has been done.

    Args:
        alone: a single sampled row draws from torch's generator, as stock does. Otherwise each row draws from a seed of
            its own, so what it gets does not depend on the calls beside it.
    """
    with _starting(_Start(alone)):
        return model._generate(**kwargs)


class GenerateCall:
    """One call of `generate`: rows in, engine, rows out.

    Some calls need their rows to go on together until the last one ends, as all do in stock: when scores are returned
    (stock goes on feeding padding to finished rows and returns what comes of it), and when rows end by a criterion
    while no EOS is set (stock then goes on sampling).
    """

    def __init__(self, model, input_ids, processors, criteria, config, model_kwargs):
        self.engine = model.__dict__[ATTRIBUTE].engine()
        self.config = config
        self.input_ids = input_ids
        self.batch, self.width = input_ids.shape
        self.padding = _left_padding(input_ids, model_kwargs)
        self.pad = None if config._pad_token_tensor is None else int(config._pad_token_tensor)
        self.scores = bool(config.return_dict_in_generate and config.output_scores)
        self.logits = bool(config.return_dict_in_generate and config.output_logits)
        self.max_new, self.eos, self.row_criteria = _split_criteria(criteria, self.width)
        self.together = self.batch > 1 and (self.scores or self.logits or bool(self.row_criteria and not self.eos))
        self.params, self.row_processors = self._split_processors(list(processors))
        self.tokens: list[list[int]] = [[] for _ in range(self.batch)]
        self.ended_at: list[int | None] = [None] * self.batch  # length at which stock would call the row finished
        self.rows: list = []
        self._check_length()

    def _split_processors(self, processors: list) -> tuple[SamplingParams, list]:
        """The last processors become the sampler's where it has the same; the others run on their row, in order."""
        for processor in processors:
            option = _REFUSED_PROCESSORS.get(type(processor).__name__)
            if option:
                raise UnsupportedOption(f"{option} {_HOW}")
        vocab_size = self.engine.model.vocab_size  # an EOS outside of it, such as -1, never comes: stock's way to say none
        native: dict = {}
        if not (self.scores or self.logits):  # captured scores are stock's own processors' output
            for name, (kind, attribute) in reversed(_WARPERS.items()):
                if processors and type(processors[-1]) is kind and not _keeps_more(processors[-1]):
                    native[name] = getattr(processors.pop(), attribute)
            if len(processors) == 1 and self._same_penalty(processors[0]):
                native["repetition_penalty"] = processors.pop().penalty
        if not self.config.do_sample:
            native["temperature"] = 0.0
        params = SamplingParams(
            **native,
            max_tokens=self.max_new,
            ignore_eos=True,  # EOS is among the stop tokens below, unless rows go on together
            stop_token_ids=() if self.together else tuple(sorted(t for t in self.eos if 0 <= t < vocab_size)),
            detokenize=False,
        )
        return params, processors

    def _same_penalty(self, processor) -> bool:
        if type(processor) is not stock.RepetitionPenaltyLogitsProcessor:
            return False
        ignored = getattr(processor, "prompt_ignore_length", None)
        ignored = ignored.tolist() if torch.is_tensor(ignored) else [ignored or 0] * self.batch
        return ignored == self.padding  # the sampler penalises exactly the row's own tokens

    def _check_length(self) -> None:
        if self.max_new is None:
            raise InvalidArgument("max_new_tokens or max_length must be given")
        prompt = self.width - min(self.padding)
        if prompt + self.max_new > self.engine.max_model_len:
            raise RequestTooLarge(
                f"max_new_tokens: {prompt} prompt tokens and {self.max_new} new ones exceed the "
                f"{self.engine.max_model_len} tokens of this model's engine; lower max_new_tokens, or patch the model "
                "with a larger max_model_len"
            )

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
        """Submit every row; `alone` as in `start_generate`."""
        try:
            for row in range(self.batch):
                self.rows.append(self._submit(row, alone and self.batch == 1))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Take out of the engine what still runs."""
        for row in self.rows:
            self.engine.release(row)

    def abandon(self) -> None:
        """`release` for finalizers."""
        for row in self.rows:
            self.engine.abandon(row)

    def result(self):
        """What `generate` returns, once `complete()`. Raises a row's own error."""
        for row in self.rows:
            row.raise_error()
        return self._result()

    def _submit(self, row: int, alone: bool):
        params = self.params
        if self.config.do_sample and not alone:
            params = replace(params, seed=int(torch.randint(2**62, ())))
        hooks = RowHooks(
            processors=self._row_processor(row),
            criteria=self._row_criterion(row),
            replace=self._padding_rule(row),
            on_token=self.tokens[row].append,
            capture=self.scores or self.logits,
            torch_rng=bool(self.config.do_sample) and alone,
        )
        ids = self.input_ids[row, self.padding[row] :].tolist()
        return self.engine.submit_when_possible(ids, params, hooks=hooks)

    def _row_processor(self, row: int) -> tuple:
        if not self.row_processors:
            return ()
        chain = stock.LogitsProcessorList(self._for_row(processor, row) for processor in self.row_processors)

        def process(token_ids, logits):
            scores = chain(self._padded(row, token_ids), logits[None])
            if scores.shape != (1, *logits.shape):
                raise InvalidArgument(
                    f"logits_processor: one of {', '.join(type(p).__name__ for p in chain)} returned shape "
                    f"{list(scores.shape)} for one row; on a patched model processors see one row at a time"
                )
            return scores[0]

        return (process,)

    def _for_row(self, processor, row: int):
        """The processor as it acts on this row alone, where stock's form counts rows. A single row has the very object."""
        if self.batch == 1:
            return processor
        if type(processor) is stock.PrefixConstrainedLogitsProcessor:
            allowed = processor._prefix_allowed_tokens_fn
            return stock.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
        processor = copy.copy(processor)
        if torch.is_tensor(getattr(processor, "prompt_ignore_length", None)):
            processor.prompt_ignore_length = int(processor.prompt_ignore_length[row])
        if type(processor) is stock.EncoderRepetitionPenaltyLogitsProcessor:
            prompt = row * len(processor.encoder_input_ids) // self.batch  # fewer prompts than rows: return sequences
            processor.encoder_input_ids = processor.encoder_input_ids[prompt : prompt + 1]
        if type(processor) is stock.EncoderNoRepeatNGramLogitsProcessor:
            prompt = row * processor.batch_size // self.batch
            processor.batch_size, processor.generated_ngrams = 1, processor.generated_ngrams[prompt : prompt + 1]
        return processor

    def _row_criterion(self, row: int) -> tuple:
        if not self.row_criteria and not self.together:
            return ()

        def ended(token_ids) -> bool:
            """Whether the row ends here. Rows that go on together are only marked."""
            if self.ended_at[row] is not None:
                return False
            length = len(token_ids) - (self.width - self.padding[row])
            met = self._criteria_met(row, token_ids)  # asked at every token, as in stock
            over = met or token_ids[-1] in self.eos or length >= self.max_new
            if over and self.together:
                self.ended_at[row] = length
            return over and not self.together

        return (ended,)

    def _criteria_met(self, row: int, token_ids) -> bool:
        if not self.row_criteria:
            return False
        ids = self._padded(row, token_ids)
        scores = tuple(pair[1][None] for pair in self.rows[row].captured()) if self.scores else None
        met = False
        for criterion in self.row_criteria:
            answer = torch.as_tensor(criterion(ids, scores))
            if answer.numel() != 1:
                raise InvalidArgument(
                    f"stopping_criteria: {type(criterion).__name__} answered for {answer.numel()} rows, not one; on a "
                    "patched model criteria see one row at a time"
                )
            met |= bool(answer)
        return met

    def _padding_rule(self, row: int):
        if not (self.together and self.eos):
            return None
        return lambda token: token if self.ended_at[row] is None else self.pad

    def _padded(self, row: int, token_ids) -> torch.Tensor:
        """[1, L] what stock would show: the row with its left padding."""
        prefix = self.input_ids[row, : self.padding[row]].tolist()
        return torch.tensor([prefix + list(token_ids)], dtype=torch.int64, device=self.input_ids.device)

    def complete(self) -> bool:
        """Whether the result is there. Rows that go on together may still run: `release` them."""
        if self.together and None not in self.ended_at and min(map(len, self.tokens)) >= max(self.ended_at):
            return True
        return all(row.finished for row in self.rows) or any(row.output.error for row in self.rows)

    def _columns(self) -> int:
        """Generated columns that are final: every row has its token there, and stock would still have been running."""
        if self.together:
            shared = min(map(len, self.tokens))
            return shared if None in self.ended_at else min(shared, max(self.ended_at))
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

    def _result(self):
        length = self._columns()
        rows = [tokens[:length] + [self.pad] * (length - len(tokens)) for tokens in self.tokens]
        generated = torch.tensor(rows, dtype=torch.int64, device=self.input_ids.device).reshape(self.batch, length)
        sequences = torch.cat([self.input_ids, generated], dim=-1)
        if not self.config.return_dict_in_generate:
            return sequences
        captured = [row.captured() for row in self.rows]
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            logits=_steps(captured, 0, length) if self.logits else None,
            scores=_steps(captured, 1, length) if self.scores else None,
        )


def _steps(captured: list[list[tuple]], which: int, length: int) -> tuple[torch.Tensor, ...]:
    """Per step one [B, V] tensor of raw (0) or processed (1) logits."""
    return tuple(torch.stack([row[step][which] for row in captured]) for step in range(length))


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


def _left_padding(input_ids, model_kwargs) -> list[int]:
    """Padding tokens before each row's prompt, from its attention mask.

    Raises UnsupportedOption for masks with zeros elsewhere and for positions other than the row's own count.
    """
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    batch, width = input_ids.shape
    if mask is None:
        padding = [0] * batch
    else:
        if mask.shape != input_ids.shape:
            raise InvalidArgument(f"attention_mask has shape {list(mask.shape)}, input_ids {list(input_ids.shape)}")
        mask = mask.bool()
        padding = (~mask).sum(-1).tolist()
        for row, count in enumerate(padding):
            if not mask[row, count:].all():
                raise UnsupportedOption(
                    f"attention_mask: row {row} has zeros after its first token; pad on the left "
                    "(tokenizer.padding_side = 'left')"
                )
    for row, count in enumerate(padding):
        if count == width:
            raise InvalidArgument(f"input_ids: row {row} is empty")
        if positions is not None:
            given = positions[row if positions.shape[0] == batch else 0, count:]
            if given.shape[0] != width - count or not torch.equal(given, torch.arange(width - count).to(given)):
                raise UnsupportedOption("position_ids other than each row's own count from 0 " + _HOW)
    return padding
