"""Keys and values of a prefix as an object: copies of its blocks on the host, in memory or in a file.

A file is in safetensors' format: token ids, and the blocks of each group as bytes; what they are good for is in its
metadata, with a SHA-256 of all of it. Nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..base.errors import InvalidArgument
from ..core.groups import GroupSpec
from ..core.request import MediaSpan
from .kv_cache import KVCache
from .transfer import to_device

_FORMAT = "hf_paged KV state 1"


@dataclass(frozen=True, eq=False, kw_only=True)
class KVState:
    """The keys and values of the first tokens of a prompt, as `Engine.save_kv` gives them: for `Engine.load_kv`, here or elsewhere.

    Attributes:
        token_ids: whose they are; whole blocks of them.
        fingerprint: what model and cache they are of.
        block_size: tokens of a block.
        salted: they were saved under a cache salt, which is not part of this.
        groups: the block groups of the model's layers.
        first_blocks: per group, the first block that is here; what is before it no later token sees.
        blocks: per group, uint8 [blocks, bytes] on the host: one row a block, over all the group's layers.
        media: the images among the tokens, by what names their contents.
    """

    token_ids: list[int]
    fingerprint: dict[str, str]
    block_size: int
    salted: bool
    groups: list[GroupSpec]
    first_blocks: list[int]
    blocks: list[torch.Tensor] = field(repr=False)
    media: tuple[MediaSpan, ...] = ()

    def __len__(self) -> int:
        """Tokens."""
        return len(self.token_ids)

    @property
    def num_bytes(self) -> int:
        """Of the blocks."""
        return sum(blocks.nbytes for blocks in self.blocks)

    def truncate(self, position: int) -> KVState:
        """The state of the first `position` tokens, in whole blocks. It shares the memory of this one.

        Raises InvalidArgument if that leaves no block, or blocks that sliding layers saw at `position` are not here.
        """
        if not isinstance(position, int) or isinstance(position, bool) or not self.block_size <= position <= len(self):
            raise InvalidArgument(f"position must be between {self.block_size} and {len(self)}, got {position!r}")
        count = position // self.block_size
        for group, first in zip(self.groups, self.first_blocks, strict=True):
            if first > group.num_unseen_blocks(count * self.block_size, self.block_size):
                raise InvalidArgument(
                    f"position {position}: layers with a window of {group.span} tokens saw some before it that are not in this "
                    f"state of {len(self)}; save the state at that position"
                )
        return KVState(
            token_ids=self.token_ids[: count * self.block_size],
            fingerprint=self.fingerprint,
            block_size=self.block_size,
            salted=self.salted,
            groups=self.groups,
            first_blocks=self.first_blocks,
            blocks=[blocks[: count - first] for first, blocks in zip(self.first_blocks, self.blocks, strict=True)],
            media=tuple(span for span in self.media if span.start < count * self.block_size),
        )

    def save(self, path: str | Path) -> None:
        """Write it to a file, which is there as a whole or not at all. Raises OSError."""
        from safetensors.torch import save_file

        tensors = {f"blocks.{index}": blocks.contiguous() for index, blocks in enumerate(self.blocks)}
        tensors["token_ids"] = torch.tensor(self.token_ids, dtype=torch.int64)
        about = dict(
            format=_FORMAT,
            fingerprint=self.fingerprint,
            block_size=self.block_size,
            salted=self.salted,
            groups=[[group.window, group.chunk] for group in self.groups],
            first_blocks=self.first_blocks,
            media=[[span.start, span.length, span.key.hex(), span.bidirectional, span.offset] for span in self.media],
        )
        text = json.dumps(about)
        path = Path(path)
        path.parent.stat()  # as an OSError, if it is not there
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            save_file(tensors, part, metadata={"about": text, "sha256": _checksum(text, tensors)})
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> KVState:
        """Read a file that `save` wrote.

        Raises OSError if it cannot be read, InvalidArgument if it is no such file, or not as it was written.
        """
        text, tensors = _read(path)
        try:
            return cls._parsed(text, tensors)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise InvalidArgument(f"path {str(path)!r} is no KV state that this version can read: {error!r}") from error

    @classmethod
    def _parsed(cls, text: str, tensors: dict[str, torch.Tensor]) -> KVState:
        about = json.loads(text)
        if about["format"] != _FORMAT:
            raise ValueError(f"format {about['format']!r}")
        media = [MediaSpan(start, length, bytes.fromhex(key), *more) for start, length, key, *more in about["media"]]
        state = cls(
            token_ids=tensors["token_ids"].tolist(),
            fingerprint={str(name): str(value) for name, value in about["fingerprint"].items()},
            block_size=int(about["block_size"]),
            salted=bool(about["salted"]),
            groups=[GroupSpec(window, chunk) for window, chunk in about["groups"]],
            first_blocks=[int(first) for first in about["first_blocks"]],
            blocks=[tensors[f"blocks.{index}"] for index in range(len(about["groups"]))],
            media=tuple(media),
        )
        state.check()
        return state

    def check(self) -> None:
        """Raise ValueError unless its parts go together."""
        count, rest = divmod(len(self.token_ids), max(1, self.block_size))
        if self.block_size < 1 or rest or count < 1 or not all(type(token) is int for token in self.token_ids):
            raise ValueError("the tokens do not fill their blocks")
        for group, first, blocks in zip(self.groups, self.first_blocks, self.blocks, strict=True):
            most = group.num_unseen_blocks(len(self.token_ids), self.block_size)
            if not 0 <= first <= most or blocks.dtype != torch.uint8 or blocks.dim() != 2 or len(blocks) != count - first:
                raise ValueError("blocks are missing")
        end = 0
        for span in self.media:
            if not end <= span.start < len(self.token_ids) or span.length < 1 or span.offset < 0:
                raise ValueError("images overlap, or are elsewhere")
            end = span.end


def _read(path: str | Path) -> tuple[str, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    open(path, "rb").close()  # as an OSError, if that is what is wrong
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, ValueError) as error:
        raise InvalidArgument(f"path {str(path)!r} is no KV state, or not all of it: {error}") from error
    text = metadata.get("about", "")
    if metadata.get("sha256") != _checksum(text, tensors):
        what = "is no KV state" if not text else "is damaged: its contents are not what was written"
        raise InvalidArgument(f"path {str(path)!r} {what}")
    return text, tensors


def _checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def copy_out(cache: KVCache, group: int, blocks: Sequence[int]) -> torch.Tensor:
    """uint8 [blocks, bytes] on the host: what blocks of a group hold."""
    index = to_device(blocks, torch.int64, cache.device)
    return torch.cat([part.index_select(0, index).cpu() for part in cache.parts(group)], dim=1)


def copy_in(cache: KVCache, group: int, blocks: Sequence[int], rows: torch.Tensor) -> None:
    """Write such rows into blocks of a group."""
    index, start = to_device(blocks, torch.int64, cache.device), 0
    for part in cache.parts(group):
        end = start + part.shape[1]
        part.index_copy_(0, index, rows[:, start:end].to(cache.device))
        start = end
