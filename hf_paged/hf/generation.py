"""`generate` of a patched model: stock transformers resolves the options, the engine computes.

`GenerationMixin.generate` prepares configuration, processors and criteria as always, then looks up `_sample`,
`_beam_search` or `_assisted_decoding` on the class. Ours take one of three ways, each with stock's results:

1. Rows (hf/rows.py): greedy search and sampling where every row goes its own way. Each becomes a request of its true
   length beside everything else the engine runs, and stops on its own.
2. Pages: transformers' own decoding loop, on a cache that lies in the engine's pages (hf/paged_cache.py). Beams,
   candidates, guidance, scores, hidden states and callables of the user's see exactly what they see in stock.
3. Stock: its own loop on its own cache, for what pages do not have, such as attention weights. `explain` tells.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from ..base.errors import InvalidArgument, RequestTooLarge, UnsupportedOption
from ..runtime.batch import active_context
from . import exact, row_adapters
from .embeds import check_embeds
from .names import CACHE_NAME, CACHE_NAMES
from .paged_cache import PagedCache, begun
from .paged_call import cache_of, paged_call
from .peft import obstacles, replaces_preparation
from .rows import RowGeneration, rows_suffice
from .spec import has_mrope, text_config
from .stock_cache import to_pages, to_stock, why_not_paged, why_not_stock
from .swap import Swapped
from .vision.rows import has_images, input_names, why_not
from .weights import float_parameter, is_spread

_KNOWN = {
    "attention_mask", "position_ids", "logits_to_keep", "use_cache", "inputs_embeds", "output_hidden_states", "tokenizer",
    *CACHE_NAMES,
}  # fmt: skip


class PagedMixin(Swapped):
    """Decoding methods of a patched model. `self._hf_paged` is its Patch."""

    def generate(self, *args, **kwargs):
        with _starting(None):  # a `generate` inside a started one is its own
            shared = self._hf_paged.calls_of_all
            if shared is not None:
                return shared.run(lambda: self._generate(*args, **kwargs), args, kwargs)
            return self._generate(*args, **kwargs)

    def _generate(self, *args, adapter_names=None, **kwargs):
        with row_adapters.named(self, adapter_names):
            return self._generate_rows(*args, **kwargs)

    def _generate_rows(self, *args, **kwargs):
        if kwargs.get("cache_implementation") == "paged":
            raise UnsupportedOption(
                "cache_implementation='paged' is transformers' own; leave it out, pages are used anyway"
            )
        return super().generate(*args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        raise UnsupportedOption(
            "generate_batch is not supported on a patched model; use generate, or hf_paged.engine_of(model).generate"
        )

    def __call__(self, *args, **kwargs):
        if active_context() is not None:
            return super().__call__(*args, **kwargs)
        cache = cache_of(kwargs)
        if isinstance(cache, PagedCache):
            options = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
            return paged_call(cache, *args, **options)
        if self._hf_paged.calls_of_all is not None:
            self._hf_paged.calls_of_all.check_free()
        if exact.takes(self, args, kwargs):
            return exact.exact_forward(self, super().__call__, args, kwargs)
        return super().__call__(*args, **kwargs)

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
        call = _Decoding(self, super()._sample, input_ids, generation_config, synced_gpus, model_kwargs)
        if call.must_be_stock():
            return call.on_stock(logits_processor, stopping_criteria, streamer=streamer)
        call.check_inputs()
        call.leave_out_empty()
        shift_free = self._hf_paged.adaptations.shift_free
        images = self._hf_paged.adapter.media
        if rows_suffice(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_kwargs,
            shift_free=shift_free,
            images=images,
        ):
            rows = RowGeneration(self, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
            start = _start.get()
            if start is None or streamer is not None:
                return rows.run(streamer)
            rows.start(alone=start.alone)
            return rows
        return call.on_pages(logits_processor, stopping_criteria, streamer=streamer)

    def _beam_search(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus: bool = False,
        **model_kwargs,
    ):
        call = _Decoding(self, super()._beam_search, input_ids, generation_config, synced_gpus, model_kwargs)
        run = call.on_stock if call.must_be_stock() else call.on_pages
        return run(logits_processor, stopping_criteria)

    def _assisted_decoding(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus: bool = False,
        streamer=None,
        inputs_tensor=None,
        assistant_model=None,
        assistant_tokenizer=None,
        tokenizer=None,
        **model_kwargs,
    ):
        if self._hf_paged.team is not None and assistant_model is not None and is_spread(assistant_model):
            raise UnsupportedOption("assistant_model: beside a sharded model it must not be sharded itself")
        call = _Decoding(self, super()._assisted_decoding, input_ids, generation_config, synced_gpus, model_kwargs)
        without = not model_kwargs.get("use_cache", True)  # refused by stock
        run = call.on_stock if without or call.must_be_stock(takes_back=True) else call.on_pages
        return run(
            logits_processor,
            stopping_criteria,
            streamer=streamer,
            inputs_tensor=inputs_tensor,
            assistant_model=assistant_model,
            assistant_tokenizer=assistant_tokenizer,
            tokenizer=tokenizer,
        )

    def _apply(self, fn, recurse=True):
        """`to`, `half`, `cuda`, ...: a model that changes device or dtype is patched anew for what it became."""
        before = float_parameter(self)
        before = before.device, before.dtype
        result = super()._apply(fn, recurse)
        after = float_parameter(self)
        if (after.device, after.dtype) != before:
            self._hf_paged.renew(self)
        return result


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

    Returns the RowGeneration, for the caller to step and collect beside others; or the result itself where decoding is
    not a matter of independent rows (beam search, an assistant model) or had to be streamed, and is done.

    Args:
        alone: a single sampled row draws from torch's generator, as stock does. Otherwise each row draws from a seed of
            its own, so what it gets does not depend on the calls beside it.
    """
    with _starting(_Start(alone)):
        return model._generate(**kwargs)


class _Decoding:
    """One call of a stock decoding method, and where it runs."""

    def __init__(self, model, method, input_ids, config, synced_gpus: bool, model_kwargs: dict):
        self.model, self.method = model, method
        self.input_ids, self.config, self.synced_gpus, self.kwargs = input_ids, config, synced_gpus, model_kwargs
        self.why = "use_cache"  # the option that keeps the call from pages, if one does
        images = model._hf_paged.adapter.media
        self._image_names = input_names(images) if has_images(images, model_kwargs) else frozenset()

    # -- stock's own loop on its own cache

    def must_be_stock(self, *, takes_back: bool = False) -> bool:
        """Whether pages do not have what this call needs. Told to the patch, which raises if it is strict.

        `takes_back`: the method drops tokens again that it has computed.
        """
        for self.why, reason in self._reasons(takes_back or self.config.is_assistant):
            if (
                not self.config.is_assistant
            ):  # else these are guesses for another model, whose masks the caller never saw
                self.model._hf_paged.note_fallback(self.why, reason)
            return True
        return False

    def _reasons(self, takes_back: bool):
        config, kwargs = self.config, self.kwargs
        adapter = self.model._hf_paged.adapter
        outdated = self.model._hf_paged.adaptations.outdated()
        if outdated:
            yield "latent attention", outdated
        if torch.is_autocast_enabled(self.model.device.type):
            yield "torch.autocast", "pages hold the model's own dtype"
        if self.synced_gpus:
            yield "synced_gpus", "all processes must run the same forwards"
        if config.return_dict_in_generate and config.output_attentions:
            yield "output_attentions", "the paged kernels never form attention weights"
        if getattr(config, "use_mtp", None):
            yield "use_mtp", "the model's multi-token heads keep a cache of their own"
        if config.cache_implementation is not None:
            yield "cache_implementation", f"{config.cache_implementation!r} was asked for instead of pages"
        if text_config(self.model).num_hidden_layers != adapter.num_layers:
            yield "assistant_early_exit", "only some of the layers run"
        if adapter.states and takes_back:
            yield "assisted decoding", "the model's layers keep a state, which cannot be taken back by some tokens"
        yield from self._reasons_of_images()
        for name, value in kwargs.items():
            if name not in _KNOWN and name not in self._image_names and not _is_empty(name, value):
                yield name, "the engine has no place for it"
        cache = cache_of(kwargs)
        if adapter.team is not None and cache is not None and begun(cache):
            yield "past_key_values", "each rank has the keys and values of its own heads only"
        if not kwargs.get("use_cache", True):
            if config.return_dict_in_generate and config.output_hidden_states:
                yield "use_cache", "without a cache every step shows the hidden states of whole rows"
            if cache is not None and begun(cache):
                yield "use_cache", "with a cache given, every step feeds the whole row to it again"
        if cache is not None and not isinstance(cache, PagedCache):
            reason = why_not_paged(cache, self.model._hf_paged, len(self.input_ids))
            if reason and (begun(cache) or getattr(cache, "_is_user_defined", False)):
                yield "past_key_values", reason
        yield from self._reasons_of_the_mask()
        if (rows := row_adapters.current()) is not None:
            try:
                rows.load()
            except UnsupportedOption as error:
                yield "adapter_names", str(error)
        yield from obstacles(self.model)
        if replaces_preparation(self.model):
            yield "prepare_inputs_for_generation", "it was replaced on the model, as PEFT's prompt learning does"

    def _reasons_of_images(self):
        if not self._image_names:
            return
        images, cache = self.model._hf_paged.adapter.media, cache_of(self.kwargs)
        yield from why_not(images, self.input_ids, self.kwargs)
        pixels = images.family.names[0]
        if cache is not None and begun(cache):
            yield pixels, "images in the middle of a given cache"
        if self.kwargs.get("inputs_embeds") is not None:
            yield pixels, "it is given beside inputs_embeds"
        if row_adapters.current() is not None:
            yield pixels, "an adapter of single rows may change what the encoder sees"
        if self.config.prefill_chunk_size is not None:
            yield pixels, "transformers cuts the prompt itself (prefill_chunk_size)"

    def _reasons_of_the_mask(self):
        mask, positions = self.kwargs.get("attention_mask"), self.kwargs.get("position_ids")
        flaw = self.model._hf_paged.adaptations.padding_flaw
        if mask is not None:
            if mask.dim() != 2:
                yield "attention_mask", f"it has {mask.dim()} dimensions"
            elif bool(((mask == 0) & (mask.cumsum(-1) > 0)).any()):
                yield "attention_mask", "it has zeros after a row's first token"
            elif flaw is not None and bool((mask == 0).any()):
                new = self.config.max_length - self.input_ids.shape[1]
                if mask.shape[1] + new >= flaw.columns:
                    yield "attention_mask", flaw.reason
        if positions is not None and positions.dim() != 2 and not self._has_place_for(positions):
            yield "position_ids", f"it has {positions.dim()} dimensions"

    def _has_place_for(self, positions: torch.Tensor) -> bool:
        """Whether positions of more than 2 dimensions are those of M-RoPE, of text or of a model whose images are on pages."""
        if not has_mrope(self.model) or positions.dim() != 3 or len(positions) not in (1, 3, 4):
            return False
        images = self.model._hf_paged.adapter.media
        return _is_text_only(positions) or (images is not None and images.shifts_positions)

    def on_stock(self, logits_processor, stopping_criteria, **options):
        pages = cache_of(self.kwargs)
        if isinstance(pages, PagedCache):  # earlier calls of whoever drafts were on pages
            reason = why_not_stock(self.model._hf_paged)
            if reason:
                raise UnsupportedOption(f"past_key_values: {self.why} needs transformers' cache; {reason}")
            self.kwargs |= {name: None for name in CACHE_NAMES if self.kwargs.get(name) is pages}
            self.kwargs[CACHE_NAME] = to_stock(pages, whole=True)
            pages.close()
        rows = row_adapters.current()
        with nullcontext() if rows is None else rows.on_stock(self.why):
            return self._run(logits_processor, stopping_criteria, **options)

    # -- stock's own loop on pages

    def leave_out_empty(self) -> None:
        """Take from the call's inputs what a text without images leaves empty: see `_is_empty`, `_is_text_only`."""
        kept = _KNOWN | self._image_names
        for name in [name for name, value in self.kwargs.items() if name not in kept and _is_empty(name, value)]:
            del self.kwargs[name]
        positions = self.kwargs.get("position_ids")
        if positions is not None and positions.dim() == 3 and _is_text_only(positions) and not self._image_names:
            self.kwargs["position_ids"] = positions[0]

    def check_inputs(self) -> None:
        """Raise for wrong embeddings, rows without a token and more tokens than a sequence of the engine may have."""
        embeds, mask = self.kwargs.get("inputs_embeds"), self.kwargs.get("attention_mask")
        if embeds is not None:
            check_embeds(self.model, embeds, self.input_ids, self.kwargs)
        columns = self.input_ids.shape[1] if embeds is None else embeds.shape[1]
        columns = max(columns, getattr(self.config, "_mask_length", 0))
        padding = [0]
        if mask is not None:
            columns, padding = mask.shape[1], (mask == 0).sum(-1).tolist()
        if max(padding) == columns:
            raise InvalidArgument(f"input_ids: row {padding.index(columns)} is empty; give at least one token")
        prompt, new = columns - min(padding), self.config.max_length - self.input_ids.shape[1]
        most = self.model._hf_paged.engine().max_model_len
        if prompt + new > most:
            raise RequestTooLarge(
                f"max_new_tokens: {prompt} prompt tokens and {new} new ones exceed the {most} tokens of this model's "
                "engine; lower max_new_tokens, or patch the model with a larger max_model_len"
            )

    def on_pages(self, logits_processor, stopping_criteria, **options):
        if not any(name in inspect.signature(self.model.forward).parameters for name in CACHE_NAMES):
            self.model._hf_paged.note_fallback("use_cache", f"{type(self.model).__name__} knows no cache")
            return self.on_stock(logits_processor, stopping_criteria, **options)
        self.check_inputs()
        self.leave_out_empty()
        given, wanted = cache_of(self.kwargs), self.kwargs.get("use_cache")
        for name in CACHE_NAMES:
            self.kwargs.pop(name, None)
        pages = given if isinstance(given, PagedCache) else PagedCache(self.model._hf_paged.engine(), self._adapters())
        guided = self._guide(logits_processor)
        handed_out = False
        try:
            if given is not None and given is not pages and begun(given):
                to_pages(given, pages, self.kwargs.get("attention_mask"))
            if self.config.is_assistant:
                pages.activate_past_recording()
            self.kwargs["use_cache"] = True
            result = self._run(logits_processor, stopping_criteria, **{CACHE_NAME: pages}, **options)
            cache = self._cache_of_the_caller(pages, given, wanted)
            handed_out = cache is pages
        finally:
            for closing in guided if handed_out else [*guided, pages]:
                closing.close()
        if not self.config.return_dict_in_generate:
            return result
        fields = {name: value for name, value in result.items() if name != CACHE_NAME}
        return type(result)(**fields, **({} if cache is None else {CACHE_NAME: cache}))

    def _run(self, logits_processor, stopping_criteria, **options):
        return self.method(
            self.input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=self.config,
            synced_gpus=self.synced_gpus,
            **options,
            **self.kwargs,
        )

    def _adapters(self) -> list[str] | None:
        """The adapter of every row, where the call names some."""
        rows = row_adapters.current()
        return None if rows is None else rows.of_rows(len(self.input_ids))

    def _guide(self, logits_processor) -> list[PagedCache]:
        """Put the second forward of classifier-free guidance on pages too."""
        caches = []
        for processor in logits_processor:
            if type(processor) is UnbatchedClassifierFreeGuidanceLogitsProcessor:
                context = processor.unconditional_context
                if processor.model is self.model and context["use_cache"] and context[CACHE_NAME] is None:
                    caches.append(PagedCache(self.model._hf_paged.engine(), self._adapters()))
                    context[CACHE_NAME] = caches[-1]
        return caches

    def _cache_of_the_caller(self, pages: PagedCache, given, wanted: bool):
        """What the caller gets as this call's cache, if anything."""
        if isinstance(given, PagedCache) or self.config.is_assistant:
            return pages  # whoever drafts goes on with it
        if self.model._hf_paged.team is not None:
            return None  # each rank has a part
        if given is not None and getattr(given, "_is_user_defined", False):
            return to_stock(pages, into=given)
        if not (self.config.return_dict_in_generate and wanted):
            return None
        return to_stock(pages) if why_not_stock(self.model._hf_paged) is None else pages


def _is_empty(name: str, value) -> bool:
    """Whether an input says nothing: unset, images not given (an empty dict), or all tokens said to be text (0)."""
    if name in ("mm_token_type_ids", "token_type_ids") and isinstance(value, torch.Tensor):
        return not bool(value.any())
    return value is None or value is False or (isinstance(value, dict) and not value)


def _is_text_only(positions: torch.Tensor) -> bool:
    """Whether [3 or 4, B, T] positions (text, temporal, height, width; M-RoPE) are one and the same, as those of text."""
    return positions.dim() == 3 and bool((positions == positions[:1]).all())
