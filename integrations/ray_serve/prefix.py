"""What a prompt begins with, and which replicas have seen it."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain

CHARACTERS = 256  # of a block: the tokens of few of the engine's blocks
BLOCKS = 64  # that are looked at; prompts that agree so far are sent to one place
KEY_BYTES = 16
_CHATS = ("/v1/chat/completions", "/v1/responses")


def prefix_keys(path: str, body) -> tuple[bytes, ...]:
    """A key for each block of what the prompt of a request begins with; each stands for all blocks before it, too.

    Requests whose keys differ share nothing in the engine's cache: the chain begins with the model (an adapter is one) and
    the `cache_salt`, as the engine's own does.

    Args:
        path: of the route, below where the app is mounted.
        body: what its JSON holds; anything.

    Returns () for requests that generate nothing, and for bodies that no replica will take either.
    """
    if not isinstance(body, dict):
        return ()
    if path in _CHATS:
        text = _conversation(body)
    elif path == "/v1/completions":
        text = _first(body.get("prompt"))
    else:
        return ()
    if not text:
        return ()
    key = _digest(json.dumps([body.get("model"), body.get("cache_salt")]).encode())
    keys = []
    for start in range(0, min(len(text), CHARACTERS * BLOCKS), CHARACTERS):
        key = _digest(key + text[start : start + CHARACTERS].encode(errors="surrogatepass"))
        keys.append(key)
    return tuple(keys)


def _conversation(body: dict) -> str:
    """In the order in which templates write it: tools and instructions, then the turns, each in one form."""
    said = body["messages"] if "messages" in body else body.get("input")
    turns = said if isinstance(said, list) else [said]
    parts = chain([body.get("tools") or [], body.get("instructions") or ""], turns[: CHARACTERS * BLOCKS])
    text, length = [], 0
    for part in parts:
        text.append(json.dumps(part, sort_keys=True, ensure_ascii=False))
        length += len(text[-1])
        if length > CHARACTERS * BLOCKS:
            break
    return "\n".join(text)


def _first(prompt) -> str:
    """The first of several prompts, as text; token ids as numbers."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list):
        return ",".join(map(str, prompt[: CHARACTERS * BLOCKS]))
    return prompt if isinstance(prompt, str) else ""


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


class PrefixTable:
    """Which replicas were given prompts with which beginnings; those used last.

    Args:
        capacity: keys that are kept.
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._holders: OrderedDict[bytes, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def longest(self, keys: tuple[bytes, ...], replicas: Iterable[str]) -> set[str]:
        """Those of `replicas` that have seen the most of it; empty if none has seen any."""
        among = set(replicas)
        for key in reversed(keys):
            found = self._holders.get(key, set()) & among
            if found:
                return found
        return set()

    def add(self, keys: tuple[bytes, ...], replica: str) -> None:
        """It is given a prompt that begins so."""
        for key in reversed(keys):  # the beginning is forgotten last
            self._holders.setdefault(key, set()).add(replica)
            self._holders.move_to_end(key)
        while len(self._holders) > self._capacity:
            self._holders.popitem(last=False)

    def keep(self, replicas: Iterable[str]) -> None:
        """Forget all other replicas: they have ended, and what they had in their caches with them."""
        among = set(replicas)
        for key, holders in list(self._holders.items()):
            if not holders <= among:
                holders &= among
                if not holders:
                    del self._holders[key]


def ranked(
    loads: dict[str, int], keys: tuple[bytes, ...], table: PrefixTable, slack: int
) -> list[str]:
    """Replicas in the order in which they should be asked to take a prompt.

    First the one that has seen the longest part of it (the least loaded of several), unless it has over `slack` requests
    more than the least loaded of all; then the others by their load. Which of equals is first depends on how the prompt
    begins, so that fronts that know nothing of each other choose alike.

    Args:
        loads: requests that each has.
    """

    def order(name: str):
        return loads[name], _digest(keys[0] + name.encode()) if keys else b""

    names = sorted(loads, key=order)
    seen = [name for name in names if name in table.longest(keys, names)]
    if not seen or loads[seen[0]] > loads[names[0]] + slack:
        return names
    return [seen[0], *(name for name in names if name != seen[0])]
