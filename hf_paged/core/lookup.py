"""Prompt lookup: guess how a sequence goes on from where its latest tokens occurred before."""

from __future__ import annotations

_MAX_CANDIDATES = 16  # occurrences looked at; the latest are the likeliest


class PromptLookup:
    """The n-grams of one growing list of tokens, prompt and output.

    Every token is indexed once. Two occurrences are compared by how many tokens before them agree.

    Args:
        shortest: tokens that must agree for a guess; at least 1.
        longest: agreement beyond this many tokens makes an occurrence no better.
    """

    __slots__ = ("_earlier", "_latest", "_longest", "_shortest")

    def __init__(self, shortest: int, longest: int):
        assert 1 <= shortest <= longest, (shortest, longest)
        self._shortest, self._longest = shortest, longest
        self._latest: dict[tuple[int, ...], int] = {}  # `shortest` tokens -> the last position they come before
        self._earlier: list[int] = []  # of each position, the one before it with the same tokens; -1: none

    def guess(self, token_ids: list[int], count: int) -> list[int]:
        """The `count` tokens that would follow if history repeated itself; empty if nothing matches.

        `token_ids` is what it was at the last call and what came since. Of the occurrences that agree best, the latest
        is copied. One that overlaps the end is copied on and on, as the period it is.
        """
        self._index(token_ids)
        start = self._best(token_ids)
        if start < 0:
            return []
        guess = token_ids[start : start + count]
        period = len(token_ids) - start
        while len(guess) < count:
            guess.append(guess[len(guess) - period])
        return guess

    def _index(self, token_ids: list[int]) -> None:
        """Take in every position that has a token; the end has none yet, so it never finds itself."""
        shortest = self._shortest
        for position in range(len(self._earlier), len(token_ids)):
            if position < shortest:
                self._earlier.append(-1)
                continue
            gram = tuple(token_ids[position - shortest : position])
            self._earlier.append(self._latest.get(gram, -1))
            self._latest[gram] = position

    def _best(self, token_ids: list[int]) -> int:
        """The position whose history agrees best with the end's; -1 if none does."""
        end, longest = len(token_ids), self._longest
        position = self._latest.get(tuple(token_ids[max(0, end - self._shortest) :]), -1)
        best, most = -1, 0
        for _ in range(_MAX_CANDIDATES):
            if position < 0 or most == longest:
                break
            agreed = self._shortest
            while agreed < min(longest, position) and token_ids[position - agreed - 1] == token_ids[end - agreed - 1]:
                agreed += 1
            if agreed > most:
                best, most = position, agreed
            position = self._earlier[position]
        return best
