"""Responses that are kept, so that they can be read again, gone on from, or cancelled."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from pydantic_core import to_json

from ..errors import Refused

RUNNING = ("queued", "in_progress")


@dataclass(eq=False)
class Record:
    """One response, as far as it has come.

    Attributes:
        owner: digest of the API key it was asked for with; None where there are none. Nobody else is told of it.
        response: as clients get it; its `output` grows.
        items: all that the model was given, earlier turns included.
        events: as they were or would have been streamed, each at its sequence number; None if they are not kept.
        task: what runs it in the background.
    """

    owner: bytes | None
    response: dict
    items: list[dict]
    events: list[bytes] | None = None
    task: asyncio.Task | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        return self.response["id"]

    @property
    def running(self) -> bool:
        return self.response["status"] in RUNNING

    def tell(self) -> None:
        """Wake those who read the events."""
        self._news.set()
        self._news = asyncio.Event()

    async def read(self, place: int) -> AsyncIterator[bytes]:
        """The events from number `place` on, as they come."""
        while True:
            news = self._news
            while place < len(self.events):
                yield self.events[place]
                place += 1
            if not self.running:
                return
            await news.wait()

    def size(self) -> int:
        """Bytes that it takes as JSON."""
        return len(to_json(self.response)) + len(to_json(self.items)) + sum(map(len, self.events or ()))


class Store:
    """The responses used last, those that run not counted.

    Args:
        most: responses that are kept; 0: none.
        most_bytes: of all of them, as JSON.
    """

    def __init__(self, most: int, most_bytes: int):
        self._most, self._most_bytes = most, most_bytes
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._sizes: dict[str, int] = {}  # of those that have ended
        self._bytes = 0

    @property
    def keeps(self) -> bool:
        return self._most > 0

    def add(self, record: Record) -> None:
        """One that runs."""
        self._records[record.id] = record

    def settle(self, record: Record) -> None:
        """One that has ended. Those not used for longest make room for it; one that is too large is forgotten itself."""
        if record.running or record.id in self._sizes:
            raise ValueError(f"{record.id} has not just ended")
        self._records.setdefault(record.id, record)
        self._records.move_to_end(record.id)
        self._sizes[record.id] = record.size()
        self._bytes += self._sizes[record.id]
        if self._sizes[record.id] > self._most_bytes:
            return self._drop(record.id)
        while len(self._sizes) > self._most or self._bytes > self._most_bytes:
            self._drop(next(name for name in self._records if name in self._sizes))

    def get(self, name: str, owner: bytes | None, *, param: str | None = None) -> Record:
        """Raises Refused if there is no such response of this owner."""
        record = self._records.get(name)
        if record is None or record.owner != owner:
            status, said = (404, "") if param is None else (400, f"{param}: ")
            raise Refused(f"{said}response {name!r} is not here", param=param, status=status, code="response_not_found")
        self._records.move_to_end(name)
        return record

    def forget(self, record: Record) -> None:
        """Whatever has become of it."""
        if record.task is not None:
            record.task.cancel()
        self._drop(record.id)

    def _drop(self, name: str) -> None:
        self._records.pop(name, None)
        self._bytes -= self._sizes.pop(name, 0)
