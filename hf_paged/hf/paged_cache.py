"""A transformers Cache whose keys and values lie in the engine's pages.

transformers' decoding loops (beam search, assisted decoding, sampling with anything a user brings along) ask three
things of a cache: to be handed to the model with the next tokens, to reorder its rows, and to drop its last tokens.
With this one they run on pages as they are: rows fork and end by reference, and the model computes a packed ragged batch
of the rows' own tokens, however they were padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache

from ..base.errors import UnsupportedOption
from ..core.request import MediaSpan
from ..engine.held import HeldRows


class PagedCache(Cache):
    """Rows of a batch on the pages of a patched model's engine.

    Columns are what the caller counts, padding included; a row's tokens are its columns without the padding on its left.

    Args:
        adapters: the name of every row's adapter; None: no row has one.

    Attributes:
        rows: the engine's rows; None before the first tokens came.
        width: columns so far.
        padding: per row, padding columns.
    """

    def __init__(self, engine, adapters: list[str] | None = None):
        super().__init__(layers=[])
        self.engine = engine
        self.adapters = adapters
        self.rows: HeldRows | None = None
        self.width = 0
        self.padding: list[int] = []
        self._keep_past = False

    # -- what transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def __len__(self) -> int:
        return len(self.engine.model.layers)

    def __repr__(self) -> str:
        return f"PagedCache({len(self.padding)} rows, {self.width} columns)"

    @property
    def batch_size(self) -> int:
        return len(self.padding) if self.rows is not None else -1

    @property
    def is_initialized(self) -> bool:
        return self.rows is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return not self.engine.has_state

    @property
    def is_sliding(self) -> list[bool]:
        return [layer.window is not None or layer.chunk is not None for layer in self.engine.model.layers]

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    def activate_past_recording(self) -> None:
        self._keep_past = True
        if self.rows is not None:
            self.rows.keep_past = True

    def is_recording_past(self, layer_idx: int) -> bool:
        return self._keep_past

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last columns: `-n` drops n of them (0 only lets sliding layers forget); `n` keeps the first n."""
        drop = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.width - tokens_to_remove)
        drop = min(drop, self.width)
        if self.rows is None:
            return
        if drop and self.engine.has_state:
            raise UnsupportedOption("crop: this model keeps a state, which cannot be taken back by some tokens")
        if drop and any(self.is_sliding) and not self._keep_past:
            raise RuntimeError("crop: call activate_past_recording before; sliding layers have dropped what they need")
        self.width -= drop
        for row, length in enumerate(self.rows.lengths):
            if drop:
                self.rows.truncate(row, max(0, length - drop))
        self.rows.forget_past()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i goes on from what row `beam_idx[i]` was. References move, nothing is copied."""
        sources = beam_idx.tolist()
        self.padding = [self.padding[source] for source in sources]
        self.rows.reorder(sources)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.padding)).repeat_interleave(repeats))

    def reset(self) -> None:
        self.close()
        self.rows, self.width, self.padding = None, 0, []

    def update(self, *args, **kwargs):
        raise UnsupportedOption("past_key_values: a PagedCache is for the patched model that made it, and only while patched")

    def __deepcopy__(self, memo):
        raise UnsupportedOption("past_key_values: pages cannot be copied; ask generate for return_dict_in_generate=True")

    def __reduce__(self):
        raise UnsupportedOption("past_key_values: pages cannot be pickled; ask generate for return_dict_in_generate=True")

    # -- on the engine's side

    def open(self, rows: Sequence[int], *, publish: bool, media: list[tuple[MediaSpan, ...]] | None = None) -> HeldRows:
        """Take empty rows of the engine, for these of the batch. `media`: spans of images in each of them."""
        num_rows = len(rows)
        adapters = None if self.adapters is None else [self.adapters[row] for row in rows]
        self.rows = self.engine.hold(num_rows, name="generate", publish=publish, adapters=adapters, media=media)
        self.rows.keep_past = self._keep_past
        self.padding = [0] * num_rows
        return self.rows

    def close(self) -> None:
        """Give the blocks back."""
        if self.rows is not None:
            self.rows.close()


def begun(cache: Cache) -> bool:
    """Whether a cache holds keys and values, or states, of any token."""
    try:
        return cache.get_seq_length() > 0
    except ValueError:  # transformers': it holds states only
        return cache.has_previous_state()
