"""Text of a growing list of tokens: incremental detokenizer, stop strings, bad words. Any Hugging Face tokenizer."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ..base.errors import InvalidArgument

_REPLACEMENT = "\ufffd"
_PROMPT_TAIL = 6  # prompt tokens that give the first output token its context
_MAX_PENDING = 12  # tokens without new text before the detokenizer looks for a place to cut
_UTF8_LENGTH = 4


class IncrementalDetokenizer:
    """Turns token ids into text as they come, never emitting half a UTF-8 character.

    The text is decode(prompt tail + output) minus decode(prompt tail): what the output adds to the prompt, so a first
    word keeps the space that separates it from the prompt even where `decode(output)` alone would strip it. For
    byte-level BPE the two are equal. Each token costs two decodes of a short window `tokens[prefix:]`, of which
    `tokens[prefix:read]` is context whose text is out already.

    Two kinds of tokenizer take back text when more follows, and no stream can: those with
    `clean_up_tokenization_spaces` (at the seams), and byte-fallback vocabularies on invalid UTF-8.
    """

    def __init__(
        self,
        tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        keep_special_token_ids: Sequence[int] = (),
        spaces_between_special_tokens: bool = True,
    ):
        self._tokenizer = tokenizer
        # where some are kept, those that are not never get as far as `decode`
        self._options = {"skip_special_tokens": skip_special_tokens and not keep_special_token_ids}
        if not spaces_between_special_tokens:
            self._options["spaces_between_special_tokens"] = False
        self._skipped = _special_ids(tokenizer).difference(keep_special_token_ids) if skip_special_tokens else frozenset()
        tail: list[int] = []
        for token in reversed(prompt_token_ids):
            if token not in self._skipped:
                tail.append(token)
                if len(tail) == _PROMPT_TAIL:
                    break
        self._tokens = tail[::-1]  # the window: context, then tokens whose text is not out
        self._read = len(tail)
        self._context = self._decode(self._tokens)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text so far, as the calls returned it."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def append(self, token_id: int) -> str:
        """Add a token. Returns the text it completes: "" while a character is incomplete."""
        if token_id in self._skipped:  # decode would drop it; here it would make the window grow
            return ""
        self._tokens.append(token_id)
        text = self._decode(self._tokens)
        if text.endswith(_REPLACEMENT):
            return self._cut() if self._num_pending >= _MAX_PENDING else ""
        if len(text) <= len(self._context) and self._num_pending < _MAX_PENDING:
            return ""  # a token without text of its own
        return self._emit(text, len(self._tokens))

    def flush(self) -> str:
        """The text still held back, at the end: an incomplete character comes out as U+FFFD."""
        return self._emit(self._decode(self._tokens), len(self._tokens)) if self._num_pending else ""

    @property
    def _num_pending(self) -> int:
        return len(self._tokens) - self._read

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, **self._options) if token_ids else ""

    def _emit(self, text: str, upto: int) -> str:
        """Put out what `text`, of the first `upto` tokens of the window, adds to the context; move the window on."""
        context = self._context
        if not text.startswith(context):  # the prompt ended within a character, which is whole now
            context = os.path.commonprefix((context, text))
        piece = text[len(context) :]
        if piece:
            self._pieces.append(piece)
        del self._tokens[: self._read]
        self._read = upto - self._read
        self._context = self._decode(self._tokens[: self._read])
        return piece

    def _cut(self) -> str:
        """Emit a settled part of a long run that is no valid UTF-8, so that the window stays short.

        A place is settled if both sides decode to the same text apart as together, and a character's length of tokens
        follows it: bytes there can no longer join.
        """
        whole = self._decode(self._tokens)
        for upto in range(len(self._tokens) - _UTF8_LENGTH, self._read, -1):
            left = self._decode(self._tokens[:upto])
            if left + self._decode(self._tokens[upto:]) == whole:
                return self._emit(left, upto)
        return self._emit(whole, len(self._tokens)) if self._num_pending > 4 * _MAX_PENDING else ""


def _special_ids(tokenizer) -> frozenset[int]:
    """The ids `decode(skip_special_tokens=True)` drops: those the tokenizers library marks, or a slow tokenizer's."""
    if getattr(tokenizer, "is_fast", False):
        return frozenset(token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(tokenizer.all_special_ids)


class StopCheck(NamedTuple):
    """`text`: all text that may be shown so far (final once `stop` is set); `stop`: the stop string found, or None."""

    text: str
    stop: str | None


class StopStringMatcher:
    """Finds the first stop string in text that comes in pieces, however it is cut up.

    The match that ends first wins; of several that end together, the longest. Text that may be the beginning of a stop
    string is held back. One automaton step (Aho-Corasick) per character: the cost is linear in the text.
    """

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False):
        self._automaton = _automaton(tuple(stop))
        self._include = include_stop_str_in_output
        self._node = 0
        self._held = ""
        self._text = ""
        self._stop: str | None = None

    def feed(self, piece: str, search: bool = True) -> StopCheck:
        """Add text. With `search=False` it passes unsearched, and no stop string may begin in it. After a match: no-op."""
        if self._stop is not None:
            return StopCheck(self._text, self._stop)
        nodes, pending = self._automaton, self._held + piece
        if not search:
            self._node, self._held = 0, ""
            self._text += pending
            return StopCheck(self._text, None)
        node = self._node
        for place, character in enumerate(piece, len(self._held) + 1):
            node = _advance(nodes, node, character)
            if nodes[node].found:
                self._stop = nodes[node].found
                end = place if self._include else place - len(self._stop)
                self._text += pending[:end]
                self._held = ""
                return StopCheck(self._text, self._stop)
        self._node = node
        safe = len(pending) - nodes[node].depth
        self._text += pending[:safe]
        self._held = pending[safe:]
        return StopCheck(self._text, None)

    def flush(self) -> str:
        """The whole text at the end: nothing follows, so what was held back is text."""
        self._text, self._held, self._node = self._text + self._held, "", 0
        return self._text


class _Node:
    """A prefix of some stop string: its length, what follows, the longest proper suffix that is a prefix too."""

    __slots__ = ("depth", "fallback", "found", "next")

    def __init__(self, depth: int):
        self.depth = depth
        self.next: dict[str, int] = {}
        self.fallback = 0
        self.found: str | None = None  # the longest stop string that ends here


def _advance(nodes: list[_Node], node: int, character: str) -> int:
    while node and character not in nodes[node].next:
        node = nodes[node].fallback
    return nodes[node].next.get(character, 0)


@lru_cache(maxsize=64)
def _automaton(stop: tuple[str, ...]) -> list[_Node]:
    """Aho-Corasick over the stop strings; node 0 is the empty prefix. Not modified once built."""
    nodes = [_Node(0)]
    for word in stop:
        node = 0
        for character in word:
            if character not in nodes[node].next:
                nodes[node].next[character] = len(nodes)
                nodes.append(_Node(nodes[node].depth + 1))
            node = nodes[node].next[character]
        nodes[node].found = word
    queue = list(nodes[0].next.values())
    for node in queue:  # breadth first: shorter prefixes are complete
        for character, child in nodes[node].next.items():
            nodes[child].fallback = _advance(nodes, nodes[node].fallback, character)
            nodes[child].found = nodes[child].found or nodes[nodes[child].fallback].found
            queue.append(child)
    return nodes


def encode_bad_words(tokenizer, words: Sequence[str]) -> list[list[int]]:
    """Token sequences of words that must not appear.

    Each word is encoded as it stands at the start of a text and after a space (leading spaces of the word itself do not
    count): most vocabularies have separate tokens for the two. Other ways to spell a word in tokens are not covered.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ")
        found = [tuple(tokenizer.encode(form, add_special_tokens=False)) for form in (bare, " " + bare)]
        if not any(found):
            raise InvalidArgument(f"bad_words has {word!r}, which the tokenizer encodes to no token")
        sequences.update(dict.fromkeys(form for form in found if form))
    return [list(sequence) for sequence in sequences]
