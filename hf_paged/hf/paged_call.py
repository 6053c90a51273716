"""One forward of transformers' decoding loops on pages: padded columns in, a packed ragged batch, padded columns out."""

from __future__ import annotations

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..base.errors import InvalidArgument, UnsupportedOption
from ..engine.held import UNKNOWN, Chunk
from ..runtime.media import Media
from .names import CACHE_NAME, CACHE_NAMES
from .paged_cache import PagedCache
from .vision.model import TransformersImages
from .vision.positions import OF_THE_POSITIONS, planes_of
from .vision.rows import count_themselves, has_images, input_names, take_images

_IGNORED = {"use_cache", "return_dict", "tokenizer"}  # newer transformers hand on the tokenizer of stop strings
_FORWARDED = {"output_hidden_states"}


def cache_of(kwargs: dict):
    """The cache among a forward's or a decoding method's keyword arguments, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def paged_call(
    cache: PagedCache,
    input_ids=None,
    *,
    inputs_embeds=None,
    attention_mask=None,
    position_ids=None,
    logits_to_keep=0,
    **options,
) -> CausalLMOutputWithPast:
    """What the cache's model returns for the next columns of `cache`, which grows by them.

    Args:
        input_ids: [B, T]; or `inputs_embeds` [B, T, H].
        attention_mask: [B, width + T], zeros on the left only.
        position_ids: [B or 1, T]; by default the columns' numbers, as in transformers. Of M-RoPE [P, B or 1, T]: the same in
            all planes, three planes, or the text's in front of three.
        logits_to_keep: logits of the last so many columns are computed and returned; 0: of all.
    """
    images = cache.engine.model.media
    known = _IGNORED | _FORWARDED
    if images is not None and (has_images(images, options) or images.shifts_positions):
        known = known | (input_names(images) if has_images(images, options) else OF_THE_POSITIONS)
    for name, value in options.items():
        if name not in known and value is not None and value is not False:
            raise UnsupportedOption(f"{name} is not supported by a forward on pages")
    given = input_ids if inputs_embeds is None else inputs_embeds
    call = _Call(cache, given, attention_mask, position_ids, logits_to_keep, bool(options.get("output_hidden_states")))
    if has_images(images, options):
        call.take_images(images, input_ids, options | {"position_ids": position_ids})
    return call.run()


class _Call:
    def __init__(self, cache, given, attention_mask, position_ids, logits_to_keep, hidden_states: bool):
        self.cache, self.hidden_states = cache, hidden_states
        self.batch, self.columns = given.shape[:2]
        self.embeds = given if given.dim() == 3 else None
        self.ids = None if self.embeds is not None else given.tolist()
        keeps = isinstance(logits_to_keep, int) and 0 < logits_to_keep < self.columns
        self.keep = logits_to_keep if keeps else self.columns
        self.padding = self._padding(attention_mask)
        # of a row's columns in this call, the first that is no padding
        self.first = [min(max(0, count - cache.width), self.columns) for count in self.padding]
        self.positions = self._positions(position_ids)
        self.count_themselves = self.positions is None  # rows with the same tokens and images have the same positions
        self.computed_from = list(self.first)  # the first column that is computed: later where the prefix cache helps
        self.media: list[Media] | None = None  # of each row

    def take_images(self, images: TransformersImages, input_ids, options: dict) -> None:
        """The columns bring images, whose embeddings stand for their placeholders."""
        if self.cache.rows is not None or input_ids is None:
            raise UnsupportedOption(f"{images.family.names[0]}: images come with the first token ids of a cache only")
        if images.shifts_positions:
            if options["position_ids"] is None:
                raise UnsupportedOption("position_ids: where there are images, they are needed")
            self.count_themselves = count_themselves(images, input_ids, self.first, options["position_ids"])
        self.media = take_images(images, input_ids, self.first, options)

    def _padding(self, mask) -> list[int]:
        width = self.cache.width
        if mask is None:
            return list(self.cache.padding) if width else [0] * self.batch
        if mask.shape != (self.batch, width + self.columns):
            raise InvalidArgument(
                f"attention_mask has shape {list(mask.shape)}, expected [{self.batch}, {width + self.columns}]"
            )
        padding = (mask == 0).sum(-1).tolist()
        for row, (before, now) in enumerate(zip(self.cache.padding, padding)):
            if now != before and before < width:
                raise UnsupportedOption(f"attention_mask: row {row} has zeros after its first token; pad on the left")
        return padding

    def _positions(self, position_ids) -> torch.Tensor | None:
        """[P, B, T], of one plane or three, if they are not the rows' own count, else None."""
        width, columns = self.cache.width, self.columns
        own = torch.arange(width, width + columns)[None] - torch.tensor(self.padding)[:, None]
        if position_ids is None:
            if not any(self.padding) or self.cache.engine.model.adaptations.shift_free:
                return None
            return torch.arange(width, width + columns).expand(1, self.batch, columns)
        given = planes_of(position_ids.cpu()).expand(-1, self.batch, columns)
        if bool((given == given[:1]).all()):
            given = given[:1]
        return None if bool(((given == own) | (own < 0)).all()) else given

    def run(self) -> CausalLMOutputWithPast:
        cache = self.cache
        fresh = cache.rows is None
        shown = list(range(self.batch))  # the row of the engine that computes each of ours
        computed = shown
        if fresh:
            computed, shown = self._distinct()
            media = None if self.media is None else [self.media[row].spans for row in computed]
            rows = cache.open(computed, publish=self.embeds is None and self.count_themselves, media=media)
            rows.labels = computed
            self._use_prefix_cache(rows, computed)
        elif self.batch != len(cache.rows):
            raise InvalidArgument(f"input_ids has {self.batch} rows, the cache {len(cache.rows)}")
        tokens = [self._tokens(row) for row in computed]
        execute = lambda context, spans: self._execute(context, spans, computed)  # noqa: E731
        chunks = cache.rows.forward(tokens, execute)
        if fresh and shown != list(range(len(computed))):
            cache.rows.reorder(shown)
        cache.rows.labels = None
        cache.width += self.columns
        cache.padding = self.padding
        return self._output(chunks, computed, shown)

    def _distinct(self) -> tuple[list[int], list[int]]:
        """(rows to compute, per row its place among them): equal prompts are computed once and fork."""
        if self.embeds is not None or self.cache.engine.is_hooked():  # hooks see every row
            return list(range(self.batch)), list(range(self.batch))
        places: dict[tuple, int] = {}
        computed, shown = [], []
        for row in range(self.batch):
            positions = () if self.count_themselves else tuple(self.positions[:, row].flatten().tolist())
            adapter = None if self.cache.adapters is None else self.cache.adapters[row]
            media = () if self.media is None else self.media[row].spans
            key = (adapter, self.first[row], tuple(self.ids[row]), positions, media)
            if key not in places:
                places[key] = len(computed)
                computed.append(row)
            shown.append(places[key])
        return computed, shown

    def _use_prefix_cache(self, rows, computed: list[int]) -> None:
        if self.hidden_states or self.embeds is not None or not self.count_themselves:
            return
        for index, row in enumerate(computed):
            needed = self.ids[row][self.first[row] : self.columns - self.keep + 1]
            if needed:
                self.computed_from[row] = self.first[row] + rows.take_hit(index, needed)

    def _tokens(self, row: int) -> list[int]:
        start = self.computed_from[row]
        if self.ids is None:
            return [UNKNOWN] * (self.columns - start)
        tokens = self.ids[row][start:]
        if any(token < 0 for token in tokens):
            raise InvalidArgument(f"input_ids has token id {min(tokens)} in row {row}; ids start at 0")
        return tokens

    def _execute(self, context, spans, computed: list[int]):
        """Run the model on one packed batch. Returns (its output, packed rows whose logits were asked for)."""
        where = [(span, computed[span.row], self.computed_from[computed[span.row]] + span.start) for span in spans]
        extra = {"output_hidden_states": True} if self.hidden_states else {}
        if self.embeds is not None:
            parts = [self.embeds[row, column : column + span.count] for span, row, column in where]
            extra["inputs_embeds"] = torch.cat(parts)[None].to(context.position_ids.device)
        if context.plan.media:
            items = {key: item for media in self.media for key, item in media.items.items()}
            for span in context.plan.media:
                own = items[span.key].embeddings
                context.embeddings.append((span.row, own[span.offset : span.offset + span.count]))
        if self.positions is not None:
            parts = [self.positions[:, row, column : column + span.count] for span, row, column in where]
            positions = torch.cat(parts, 1).to(context.position_ids)
            if len(positions) == 1:
                context.position_ids = positions
            else:
                context.rope_positions = positions[:, None]
        rows = []
        for span, _, column in where:
            skipped = max(0, self.columns - self.keep - column)
            rows += span.packed[skipped:]
        index = torch.tensor(rows, dtype=torch.int64, device=context.position_ids.device)
        return self.cache.engine.model.outputs(context, index, **extra)

    def _output(self, chunks: list[Chunk], computed: list[int], shown: list[int]) -> CausalLMOutputWithPast:
        index = torch.tensor(shown)
        logits = self._padded([chunk.result.logits for chunk in chunks], chunks, computed, self.keep)
        hidden = None
        if self.hidden_states:
            layers = zip(*(chunk.result.hidden_states for chunk in chunks), strict=True)
            hidden = tuple(self._padded(parts, chunks, computed, self.columns)[index] for parts in layers)
        same = shown == list(range(len(computed)))
        return CausalLMOutputWithPast(
            logits=logits if same else logits[index], hidden_states=hidden, **{CACHE_NAME: self.cache}
        )

    def _padded(self, parts, chunks: list[Chunk], computed: list[int], keep: int) -> torch.Tensor:
        """Packed [1, n, D] per chunk, of the last `keep` columns -> [rows, keep, D]; zeros where a row has padding."""
        if len(chunks) == 1 and keep == 1 and [span.row for span in chunks[0].spans] == list(range(len(computed))):
            return parts[0][0][:, None]  # the usual decode: one column, rows in order
        result = parts[0].new_zeros(len(computed), keep, parts[0].shape[-1])
        for part, chunk in zip(parts, chunks, strict=True):
            offset = 0
            for span in chunk.spans:
                column = self.computed_from[computed[span.row]] + span.start
                begin = max(column, self.columns - keep)
                count = column + span.count - begin
                if count > 0:
                    place = begin - (self.columns - keep)
                    result[span.row, place : place + count] = part[0, offset : offset + count]
                    offset += count
        return result
