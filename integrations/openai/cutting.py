"""Texts cut to a number of tokens."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence

from .errors import Refused


class Cutter:
    """Tokenizes texts up to a length.

    On a tokenizer of its own, one text after the other: to cut, a tokenizer is changed, and cuts what other threads give it.
    """

    def __init__(self, tokenizer):
        self._tokenizer, self._lock = copy.deepcopy(tokenizer), threading.Lock()

    def cut(self, parts: Sequence[str], most: int, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, or a pair of texts. Raises Refused where special tokens leave no room."""
        options = dict(add_special_tokens=add_special_tokens, truncation=True, max_length=most)
        try:
            with self._lock:
                return self._tokenizer(*parts, **options).input_ids
        except Exception as error:  # tokenizers has no errors of its own
            raise cannot_cut(str(error)) from error


def cannot_cut(why: str) -> Refused:
    name = "truncate_prompt_tokens"
    return Refused(f"{name}: {why}", param=name, code="invalid_value")
