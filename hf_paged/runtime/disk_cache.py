"""Prefix blocks in files, which outlive the process and may be shared by several.

    FOLDER/<fingerprint of model and cache>/<group>-<key of the prefix>.safetensors      tensors: block, seal

A file is a host row as it is, under a seal over where it belongs and every byte of it: what is cut off, changed, renamed or
from elsewhere is no block. Files appear whole, by renaming, and any may vanish at any time. The time a file was last used is
its modification time, so that all processes agree on which are the oldest.

Fingerprint, writing and looking around are one thread's work, reading that of a few others. The engine's thread only copies
rows, and asks which names there were when somebody last looked.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy
import safetensors.numpy
import torch

from ..base.errors import InvalidArgument, UnsupportedOption

_READERS = 4
_QUEUE_BYTES = 256 << 20  # of blocks that wait to be written; what comes beyond is not written
_PATIENCE = 10.0  # seconds that a sequence waits for its blocks
_LOOK_EVERY = 10.0  # seconds between two looks at what others did in the folder
_KEEP = 0.9  # of the limit, when files are deleted
_REMEMBERED = 60.0  # seconds for which a measured speed counts
_SETTLED = 30.0  # seconds without a change of the model after which its weights are read again
_STALE = 3600.0  # seconds after which an unfinished file is nobody's
_FOLDER = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"\d+-[0-9a-f]{64}\.safetensors")
_UNFINISHED = ".unfinished"

_log = logging.getLogger(__name__)


class DiskCache:
    """The files of one engine's cache. Implements `core.disk.Disk`.

    Nothing is read or written before the fingerprint is known, nor for a while after `forget`. What fails later than here is logged
    (each kind of failure once) and is a block that is not there.

    Args:
        folder: made if there is none; others' files in it are left alone.
        memory: most bytes of blocks in it, whosever they are.
        layout: says how a row is made of keys and values.
        row_bytes: of each group.
        begin_fingerprint: as of `PagedModel`.
        in_background: whether the rest of it may be done while the engine goes on.

    Raises InvalidArgument if the folder cannot be written, or `memory` is too little for a block.
    """

    def __init__(
        self,
        folder: str,
        memory: int,
        *,
        layout: str,
        row_bytes: list[int],
        begin_fingerprint: Callable[[], Callable[[], str]],
        in_background: bool,
    ):
        if memory < 2 * max(row_bytes):
            raise InvalidArgument(f"offload: disk_memory must be at least {2 * max(row_bytes)} bytes, for two blocks")
        self._root, self._memory = Path(folder), memory
        self._layout, self._row_bytes = layout, row_bytes
        self._begin_fingerprint, self._in_background = begin_fingerprint, in_background
        _probe(self._root, max(row_bytes))
        self._lock = threading.Lock()
        self._place: Path | None = None  # None: not yet, or no longer, known
        self._last: Path | None = None
        self._names: set[str] = set()
        self._sizes: tuple[int, int] = 0, 0  # bytes and files in the folder, whosever
        self._looked = 0.0
        self._looking = False
        self._closed = False
        self._epoch = 0
        self._due: float | None = None  # when to find out whose the blocks are
        self._queued = 0
        self._numbers = itertools.count()
        self._complained: set[str] = set()
        self._coming: dict[tuple[Path, str], Future] = {}
        self.skipped = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="hf_paged-disk-writer")
        self._speed: tuple[float, float] | None = None  # when it was measured, seconds a byte
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="hf_paged-disk-reader")
        self.open()

    # -- life

    def open(self) -> None:
        """Find out whose blocks the engine's are. Between two steps."""
        self._due = None
        try:
            fingerprint = self._begin_fingerprint()
        except UnsupportedOption as error:
            self._complain("model", "offload: nothing goes to disk for now", error)
            return
        opening = self._writer.submit(self._open, self._epoch, fingerprint)
        if not self._in_background:
            opening.result()

    def wait(self) -> None:
        """Until it is known whose the blocks are, and what was to be written is."""
        self._writer.submit(int).result()

    def _open(self, epoch: int, fingerprint: Callable[[], str]) -> None:
        try:
            place = self._root / hashlib.sha256(f"{fingerprint()} {self._layout}".encode()).hexdigest()
            place.mkdir(mode=0o700, exist_ok=True)
        except Exception as error:
            self._complain("opening", "offload: nothing goes to disk", error)
        else:
            self._trim()
            with self._lock:
                if epoch == self._epoch:
                    self._place = self._last = place
                    self._names = _names_in(place)

    def forget(self) -> None:
        """The model has changed: its blocks are none of these any more, nor are these its. It may go on changing."""
        self._due = time.monotonic() + _SETTLED
        with self._lock:
            self._epoch += 1
            self._place = None
            self._names = set()

    def delete(self) -> None:
        """`forget` and delete the blocks; it is found out anew at once whose the engine's are."""
        if self._closed:
            return
        self.forget()
        self._due = time.monotonic()
        if self._last is not None:
            self._writer.submit(self._delete, self._last)

    def look(self) -> None:
        """Between two steps."""
        if self._due is not None and time.monotonic() >= self._due:
            self.open()

    def _delete(self, place: Path) -> None:
        for name in _names_in(place):
            self._remove(place / name)
        self._look()

    def close(self) -> None:
        """Write what is still to be written, and end. Closing twice is fine."""
        self._closed = True
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)

    def stats(self) -> dict[str, int]:
        num_bytes, num_files = self._sizes
        return {
            "disk_bytes": num_bytes,
            "disk_bytes_limit": self._memory,
            "disk_files": num_files,
            "disk_skipped_blocks": self.skipped,
        }

    @property
    def per_byte(self) -> float | None:
        """Seconds that reading took of late; None if nothing was read for a while, and it may be faster now."""
        if self._speed is None or time.monotonic() - self._speed[0] > _REMEMBERED:
            return None
        return self._speed[1]

    def took(self, num_bytes: int, seconds: float) -> None:
        """So much was read, one block beside the other."""
        self._speed = time.monotonic(), seconds / num_bytes

    # -- blocks

    def holds(self, group: int, key: bytes) -> bool:
        """See `core.disk.Disk`."""
        if not self._looking and time.monotonic() - self._looked > _LOOK_EVERY:
            self._looking = True
            self._writer.submit(self._look)
        return _name(group, key) in self._names

    def read(self, wanted: Iterable[tuple[int, bytes]]) -> BlocksComing:
        """See `core.disk.Disk`."""
        place, coming = self._place, []
        for group, key in wanted if place is not None else ():
            at = place, _name(group, key)
            with self._lock:
                future = self._coming.get(at)
                if future is None:
                    future = self._coming[at] = self._readers.submit(self._read, place, group, key)
                    future.add_done_callback(lambda _, at=at: self._coming.pop(at, None))
            coming.append((group, key, future))
        return BlocksComing(coming, self.took)

    def write(self, group: int, key: bytes, row: torch.Tensor, *, waits: bool = False) -> None:
        """Have a row written, of which a copy is made; not if too many wait for that, unless the caller `waits` until it is."""
        if waits:
            self.wait()
        place, name = self._place, _name(group, key)
        if place is None:
            return
        if name in self._names:
            self._writer.submit(self._use, place / name)
            return
        if self._queued + row.nbytes > _QUEUE_BYTES and not waits:
            self.skipped += 1
            return
        with self._lock:
            self._queued += row.nbytes
        writing = self._writer.submit(self._write, place, group, key, row.clone())
        if waits:
            writing.result()

    # -- on threads of their own

    def _write(self, place: Path, group: int, key: bytes, row: torch.Tensor) -> None:
        name = _name(group, key)
        unfinished = place / f"{name}.{os.getpid()}.{next(self._numbers)}{_UNFINISHED}"
        try:
            block = row.numpy()
            data = safetensors.numpy.save({"block": block, "seal": _seal(place, name, block)})
            if self._sizes[0] + len(data) > self._memory:
                self._trim(len(data))
            unfinished.write_bytes(data)
            unfinished.replace(place / name)
        except OSError as error:
            self._complain("writing", "offload: a block could not be written to disk, and others may not be", error)
            self._remove(unfinished)
        else:
            with self._lock:
                self._sizes = self._sizes[0] + len(data), self._sizes[1] + 1
                if place == self._place:
                    self._names.add(name)
        finally:
            with self._lock:
                self._queued -= row.nbytes

    def _read(self, place: Path, group: int, key: bytes) -> tuple[torch.Tensor | None, float]:
        """A row, or None; and when it was there."""
        return self._row(place, group, key), time.monotonic()

    def _row(self, place: Path, group: int, key: bytes) -> torch.Tensor | None:
        name = _name(group, key)
        path = place / name
        block = None
        try:
            block = _unpacked(path.read_bytes(), place, name, self._row_bytes[group])
            if block is not None:
                self._use(path)
                return torch.from_numpy(block)
            self._complain("sound", f"offload: {path} is no block of this cache, and is deleted", None)
            self._remove(path)
        except FileNotFoundError:
            pass  # another process deleted it
        except OSError as error:
            self._complain("reading", "offload: a block could not be read from disk, and others may not be", error)
        with self._lock:
            self._names.discard(name)
        return None

    def _use(self, path: Path) -> None:
        try:
            os.utime(path)
        except OSError:
            pass  # gone, or somebody else's: then it is as old as it is

    def _look(self) -> None:
        """What others wrote and deleted."""
        self._trim()
        with self._lock:
            if self._place is not None:
                self._names = _names_in(self._place)
            self._looked, self._looking = time.monotonic(), False

    def _trim(self, room: int = 0) -> None:
        """Count the files of all models; if they, and `room` bytes more, are too many, delete those that nobody used for longest."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        num_files = len(files)
        if total + room > self._memory:
            for _, size, path in files:
                if total + room <= _KEEP * self._memory:
                    break
                self._remove(path)
                total, num_files = total - size, num_files - 1
                with self._lock:
                    if path.parent == self._place:
                        self._names.discard(path.name)
        with self._lock:
            self._sizes = total, num_files

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, bytes and path of every block."""
        now = time.time()
        for folder in _entries(self._root):
            if not _FOLDER.fullmatch(folder.name):
                continue
            for file in _entries(folder.path):
                try:
                    known = file.stat(follow_symlinks=False)
                except OSError:
                    continue  # gone
                if _FILE.fullmatch(file.name):
                    yield known.st_mtime, known.st_size, Path(file.path)
                elif file.name.endswith(_UNFINISHED) and now - known.st_mtime > _STALE:
                    self._remove(Path(file.path))

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._complain("deleting", "offload: a file could not be deleted", error)

    def _complain(self, kind: str, message: str, error: Exception | None) -> None:
        with self._lock:
            first = kind not in self._complained
            self._complained.add(kind)
        if first:
            _log.warning("%s%s", message, f": {error}" if error is not None else "")


class BlocksComing:
    """Blocks that are being read. Implements `core.disk.Reading`."""

    def __init__(self, coming: list[tuple[int, bytes, Future]], took: Callable[[int, float], None]):
        self._coming, self._took = coming, took
        self._began = time.monotonic()

    @property
    def done(self) -> bool:
        return all(future.done() for _, _, future in self._coming) or time.monotonic() - self._began > _PATIENCE

    def blocks(self) -> Iterator[tuple[int, bytes, torch.Tensor]]:
        came = [(group, key, *future.result()) for group, key, future in self._coming if future.done()]
        came = [entry for entry in came if entry[2] is not None]
        if came:
            self._took(sum(row.nbytes for _, _, row, _ in came), max(max(at for *_, at in came) - self._began, 1e-9))
        for group, key, row, _ in came:
            yield group, key, row


def _probe(root: Path, row_bytes: int) -> None:
    """Raise InvalidArgument unless blocks can be written to the folder."""
    file = root / f"{os.getpid()}.{time.monotonic_ns()}{_UNFINISHED}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            file.write_bytes(bytes(row_bytes))
        finally:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidArgument(f"offload: disk {str(root)!r} cannot be written: {error}") from error


def _entries(folder) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []  # no folder, or gone


def _names_in(place: Path) -> set[str]:
    return {entry.name for entry in _entries(place) if _FILE.fullmatch(entry.name)}


def _name(group: int, key: bytes) -> str:
    return f"{group}-{key.hex()}.safetensors"


def _seal(place: Path, name: str, block: numpy.ndarray) -> numpy.ndarray:
    """SHA-256 of where a block belongs and of its bytes: uint8 [32]."""
    digest = hashlib.sha256(f"{place.name}/{name}".encode())
    digest.update(block)
    return numpy.frombuffer(digest.digest(), dtype=numpy.uint8)


def _unpacked(data: bytes, place: Path, name: str, row_bytes: int) -> numpy.ndarray | None:
    """The block that a file is; None if it is none, or another."""
    try:
        tensors = safetensors.numpy.load(data)
        block, seal = tensors["block"], tensors["seal"]
    except Exception:  # whatever the bytes of a file may lead to
        return None
    if block.dtype != numpy.uint8 or block.shape != (row_bytes,):
        return None
    return block if numpy.array_equal(seal, _seal(place, name, block)) else None
