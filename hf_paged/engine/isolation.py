"""Finding the request that makes a step fail, by halves."""

from __future__ import annotations


class Isolation:
    """Which sequences may run while a failing step is being bisected.

    After a step with several sequences failed, each half runs by itself; a half that fails is halved again, until one
    sequence is left: the culprit. Halves that run well are let go after a number of steps that doubles with every
    failure, so that sequences which fail only together (memory, for one) still make progress.
    """

    def __init__(self):
        self._groups: list[tuple[set[int], int]] = []  # (sequences, steps they must still survive)
        self._patience = 1

    def suspects(self) -> set[int] | None:
        """The only sequences that may run now; None: all."""
        return self._groups[-1][0] if self._groups else None

    def failed(self, seq_ids: list[int]) -> int | None:
        """A step of these sequences failed. Returns the culprit if it is certain."""
        unique = list(dict.fromkeys(seq_ids))
        if self._groups:
            waiting, _ = self._groups.pop()
            rest = waiting.difference(unique)
            if rest:
                self._groups.append((rest, self._patience))
        if len(unique) == 1:
            return unique[0]
        self._patience = min(2 * self._patience, 64)
        half = len(unique) // 2
        self._groups += [(set(unique[half:]), self._patience), (set(unique[:half]), self._patience)]
        return None

    def succeeded(self) -> None:
        if not self._groups:
            self._patience = 1
            return
        group, steps = self._groups.pop()
        if steps > 1:  # go round, so that no half waits for another
            self._groups.insert(0, (group, steps - 1))

    def cleared(self) -> None:
        self._groups.pop()
