"""Calls of `generate` that are started ahead of the results somebody reads, and handed out in order."""

from __future__ import annotations

import weakref
from collections import deque

from ...hf.rows import RowGeneration

AHEAD = 4  # how far inputs are read ahead of the result that is due, in multiples of what the engine runs at once


class Started:
    """One call of `generate` on tokenized prompts. It runs while `call` is set; then `result` or `error` is there."""

    def __init__(self, model_inputs=None, error: Exception | None = None):
        self.model_inputs = model_inputs
        self.call: RowGeneration | None = None
        self.result = None
        self.error = error

    def take(self, started) -> None:
        """What `start_generate` returned."""
        if isinstance(started, RowGeneration):
            self.call = started
        else:
            self.result = started

    @property
    def done(self) -> bool:
        return self.call is None

    @property
    def num_prompts(self) -> int:
        return len(self.model_inputs["input_ids"])

    @property
    def num_rows(self) -> int:
        return len(self._sequences()) if self.call is None else self.call.batch

    def first_row(self) -> list[int]:
        """The first row's tokens so far, its prompt included."""
        if self.call is None:
            return self._sequences()[0].tolist()
        return [*self.call.input_ids[0].tolist(), *self.call.tokens[0]]

    def _sequences(self):
        return getattr(self.result, "sequences", self.result)

    def settle(self) -> bool:
        """Take the result if it is there. Returns whether it is."""
        if self.call is not None and self.call.complete():
            call, self.call = self.call, None
            call.release()
            try:
                self.result = call.result()
            except Exception as error:
                self.error = error
        return self.done

    def abandon(self) -> None:
        """Let the engine drop what still runs. For finalizers: takes no lock."""
        if self.call is not None:
            self.call.abandon()


class Ahead:
    """Iterates over a loader's items as finished `Started`, in order, while the next ones run already.

    Args:
        loader: yields model inputs, of which `start` makes a `Started`.
        most_rows: rows in the engine at once.
        batch_size: prompts in each of the loader's items.
        whole: every result is wanted and the first error ends it all. Otherwise reading ahead is bounded.
        bar: makes the progress bar, which counts prompts.
    """

    def __init__(self, loader, start, *, most_rows: int, batch_size: int, whole: bool, bar):
        self.loader = loader
        self.start = start
        self.most_rows = most_rows
        self.batch_size = batch_size
        self.whole = whole
        self.bar = bar

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        return _Reader(self)


class _Reader:
    """One pass over an `Ahead`. An item's error is raised when it is due; the next call goes on behind it."""

    def __init__(self, ahead: Ahead):
        self._ahead = ahead
        self._source = iter(ahead.loader)
        self._exhausted = False
        self._pending: deque[Started] = deque()  # in order; the first is due
        self._handed_out = 0  # prompts
        self._bar = ahead.bar()
        weakref.finalize(self, _drop, self._pending, self._bar).atexit = False

    def __iter__(self):
        return self

    def __next__(self) -> Started:
        while True:
            self._read_ahead()
            if not self._pending:
                self._bar.close()
                raise StopIteration
            if self._pending[0].done:
                return self._hand_out()
            self._pending[0].call.engine.step()
            for started in self._pending:
                if not started.done and started.settle():
                    self._bar.update(started.num_prompts)

    def _read_ahead(self) -> None:
        """Start what there is room for, unless a result can be handed out first."""
        ahead = self._ahead
        rows = sum(started.num_rows for started in self._pending if not started.done)
        while not self._exhausted and rows < ahead.most_rows:
            far = len(self._pending) * ahead.batch_size >= AHEAD * ahead.most_rows
            if self._pending and (self._pending[0].done or far and not ahead.whole):
                return
            try:
                started = ahead.start(next(self._source))
            except StopIteration:
                self._exhausted = True
                return
            except Exception as error:
                started = Started(error=error)
            self._pending.append(started)
            if started.done:
                self._bar.update(self._size(started))
            else:
                rows += started.num_rows

    def _size(self, started: Started) -> int:
        return self._ahead.batch_size if started.model_inputs is None else started.num_prompts

    def _hand_out(self) -> Started:
        started = self._pending.popleft()
        first, count = self._handed_out, self._size(started)
        self._handed_out += count
        if started.error is None:
            return started
        which = f"prompt {first}" if count == 1 else f"prompts {first} to {first + count - 1}"
        started.error.add_note(f"This is the error of {which} of the pipeline's input, counted from 0.")
        if self._ahead.whole:
            _drop(self._pending, self._bar)
        raise started.error


def _drop(pending: deque[Started], bar) -> None:
    for started in pending:
        started.abandon()
    bar.close()
