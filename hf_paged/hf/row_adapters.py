"""`generate(adapter_names=...)`: an adapter for every row of a batch.

Of a PeftModel, whose `generate` hands the names to its layers by hooks, they are its own adapters; of any other patched
model those that its engine has loaded. Either way each row runs with its adapter in the engine's batch. Where a call
takes transformers' own path, PEFT's hooks do what they are for; the engine's adapters are not there, so it is refused.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar

from ..base.errors import InvalidArgument, UnsupportedOption
from .peft import NamesByRow, names_by_row


class RowAdapters:
    """The adapters of one call's rows.

    Args:
        inside: whether the names are those of a PeftModel around the model.
    """

    def __init__(self, model, names: list[str], inside: bool):
        self._model, self._names, self._inside = model, names, inside
        self._known: dict[str, str] | None = None
        self._hooks = NamesByRow(model)

    def load(self) -> None:
        """Let the engine know a PeftModel's own adapters. Raises InvalidArgument if it cannot have them, or lacks one."""
        if self._known is not None:
            return
        engine = self._model._hf_paged.engine()
        names = dict.fromkeys(self._names)
        if self._inside:
            self._known = {name: engine.adapter_inside(name) for name in names}
        else:
            for name in names:
                engine.model.adapters.number(name)
            self._known = {name: name for name in names}

    def of_rows(self, count: int) -> list[str]:
        """The engine's name for each of `count` rows: several in a row for every name where the call makes several."""
        self.load()
        if count % len(self._names):
            raise InvalidArgument(f"adapter_names has {len(self._names)} names for {count} rows")
        each = count // len(self._names)
        return [self._known[name] for name in self._names for _ in range(each)]

    @contextmanager
    def on_stock(self, why: str):
        """Scope of transformers' own loop. Raises UnsupportedOption where it does not know the adapters."""
        if not self._inside:
            raise UnsupportedOption(
                f"adapter_names: {why} takes transformers' own path, where the engine's adapters are not known"
            )
        self._hooks.put_back()
        try:
            yield
        finally:
            self._hooks.take()

    @contextmanager
    def running(self):
        """Scope of the call: PEFT's layers are told nothing."""
        self._hooks.take()
        try:
            yield
        finally:
            self._hooks.put_back()


_current: ContextVar[RowAdapters | None] = ContextVar("hf_paged_row_adapters", default=None)


def current() -> RowAdapters | None:
    """Those of the `generate` call this is inside; None if it names none."""
    return _current.get()


@contextmanager
def named(model, given: list[str] | None):
    """The scope of one `generate` call of `model`, with the `adapter_names` it was given."""
    names = names_by_row(model)
    inside = names is not None
    if not inside and given is not None:
        if isinstance(given, str) or not given or not all(isinstance(name, str) for name in given):
            raise InvalidArgument("adapter_names must be a list of names, one for each row of the batch")
        names = list(given)
    rows = None if names is None else RowAdapters(model, names, inside)
    token = _current.set(rows)
    try:
        if rows is None:
            yield
        else:
            with rows.running():
                yield
    finally:
        _current.reset(token)
