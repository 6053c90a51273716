"""Batch files in OpenAI's format: every line is a request, which the app answers as if it had come over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import httpx
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError

from ...base.errors import InvalidArgument
from .service import new_id

PREFIX = "batch_req_"
READ_AHEAD = 16  # lines


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a batch file.

    Attributes:
        number: counted from 1.
        id: of its result: the same for the same line in the same place, and for no other.
        custom_id: None where a bad line has none.
        url, body: of a line that can be run.
        error: what is wrong with one that cannot.
    """

    number: int
    id: str
    custom_id: str | None
    url: str = ""
    body: bytes = b""
    error: dict | None = None


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    custom_id: Annotated[StrictStr, Field(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: StrictStr
    body: dict[str, Any]


def urls_of(app: FastAPI) -> frozenset[str]:
    """What a line may ask: all that the app takes a POST for at a fixed place."""
    return frozenset(path for path, methods in app.openapi()["paths"].items() if "post" in methods and "{" not in path)


def read_lines(file: BinaryIO, most: int) -> Iterator[tuple[int, bytes]]:
    """(number, line) of all lines that are not blank; of those longer than `most` bytes, the first `most` + 1."""
    number = 0
    while line := file.readline(most + 1):
        number += 1
        end = line
        while len(end) > most and not end.endswith(b"\n"):  # of one too long
            end = file.readline(most + 1) or b"\n"
        if line.strip():
            yield number, line


async def from_thread(lines: Iterator) -> AsyncIterator:
    """`lines`, read by a thread that nobody has to wait for: a pipe or a terminal may be silent for long."""
    loop, queue, room = asyncio.get_running_loop(), asyncio.Queue(), threading.Semaphore(READ_AHEAD)

    def read() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            try:
                for line in lines:
                    room.acquire()
                    loop.call_soon_threadsafe(queue.put_nowait, line)
                loop.call_soon_threadsafe(queue.put_nowait, None)
            except OSError as error:
                loop.call_soon_threadsafe(queue.put_nowait, error)

    threading.Thread(target=read, name="hf_paged-batch", daemon=True).start()
    while (line := await queue.get()) is not None:
        if isinstance(line, OSError):
            raise line
        room.release()
        yield line


class LineReader:
    """Makes sense of the lines of one file.

    Args:
        urls: see `urls_of`.
        most: bytes of a line.
    """

    def __init__(self, urls: frozenset[str], most: int):
        self._urls, self._most = urls, most
        self._seen: dict[str, int] = {}  # custom_id -> number

    def parse(self, number: int, text: bytes) -> Line:
        """Never raises: what is wrong with a line is told by its `error`."""
        custom_id = None
        try:
            if len(text) > self._most:
                raise _Bad("line_too_long", f"the line is longer than {self._most} bytes")
            content = _parsed(text)
            if isinstance(content, dict) and isinstance(content.get("custom_id"), str):
                custom_id = content["custom_id"].encode(errors="replace").decode()
            form = self._checked(content)
            first = self._seen.setdefault(form.custom_id, number)
            if first != number:
                raise _Bad("duplicate_custom_id", f"line {first} has the same custom_id", "custom_id")
            body = json.dumps(form.body).encode()
        except _Bad as bad:
            error = {"code": bad.code, "message": f"line {number}: {bad}", "param": bad.param, "line": number}
            return Line(number=number, id=_id_of(str(number).encode(), text.strip()), custom_id=custom_id, error=error)
        name = _id_of(form.custom_id.encode(), form.url.encode(), json.dumps(form.body, sort_keys=True).encode())
        return Line(number=number, id=name, custom_id=form.custom_id, url=form.url, body=body)

    def _checked(self, content: Any) -> _Form:
        try:
            form = _Form.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or None
            raise _Bad("invalid_line", f"{place}: {first['msg']}" if place else first["msg"], place) from None
        if form.url not in self._urls:
            raise _Bad("invalid_url", f"url {form.url!r} is not one of {', '.join(sorted(self._urls))}", "url")
        for name in ("stream", "background"):
            if form.body.get(name):
                raise _Bad("unsupported", f"{name} has no place in a batch", f"body.{name}")
        return form


class _Bad(Exception):
    def __init__(self, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise _Bad("invalid_json_line", "JSON too deep") from None
    except ValueError as error:
        raise _Bad("invalid_json_line", f"not JSON: {error}") from None


def _id_of(*parts: bytes) -> str:
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts))
    return PREFIX + digest.hexdigest()[:32]


class Runner:
    """Runs lines through an app, side by side.

    Args:
        most: requests under way at once.
    """

    def __init__(self, app: FastAPI, *, most: int):
        self._app, self._most = app, most

    async def results(self, lines: AsyncIterator[Line]) -> AsyncIterator[dict]:
        """One result per line, in the order in which they come."""
        # errors of the app are answers here, too, as a server gives them
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        async with (
            self._app.router.lifespan_context(self._app),
            httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client,
        ):
            running: set[asyncio.Task] = set()
            coming: asyncio.Task | None = asyncio.ensure_future(anext(lines, None))
            try:
                while coming or running:
                    awaited = running | {coming} if coming and len(running) < self._most else running
                    done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                    if coming in done:
                        line = coming.result()
                        done.remove(coming)
                        if line is not None:
                            running.add(asyncio.ensure_future(self._result(client, line)))
                        coming = line and asyncio.ensure_future(anext(lines, None))
                    running -= done
                    for task in done:
                        yield task.result()
            finally:
                left = running | {coming} if coming else running
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)

    async def _result(self, client: httpx.AsyncClient, line: Line) -> dict:
        result = {"id": line.id, "custom_id": line.custom_id, "response": None, "error": line.error}
        if line.error is None:
            answer = await client.post(line.url, content=line.body, headers={"Content-Type": "application/json"})
            result["response"] = {
                "status_code": answer.status_code,
                "request_id": answer.headers.get("x-request-id") or new_id("req"),
                "body": answer.json() if answer.headers.get("content-type") == "application/json" else answer.text or None,
            }
        return result


def succeeded(result: dict) -> bool:
    return result["response"] is not None and result["response"]["status_code"] == 200


class Results:
    """A file to which results are added, each whole and at once, so that a run that was cut off can be gone on with.

    Args:
        file: open for appending.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._done: dict[str, bool] = {}  # id of a result -> whether it is a success
        self._custom: dict[str, str] = {}  # custom_id -> id of its result

    @classmethod
    def resume(cls, path: Path) -> Results:
        """With what an earlier run left in `path`; a last line that it did not finish is cut off.

        Raises InvalidArgument for a file that holds something else.
        """
        with contextlib.ExitStack() as stack:
            results = cls(stack.enter_context(path.open("ab")))
            if path.is_file():
                results._file.truncate(results._read(path))
            stack.pop_all()  # it stays open
            return results

    def _read(self, path: Path) -> int:
        """Bytes of its whole lines."""
        whole = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n") and self._note(line):
                    whole += len(line)
                elif line.endswith(b"\n") or not line.startswith(_BEGINNING[: len(line)]):
                    raise InvalidArgument(f"{path}, line {number}: not a result of a batch; choose another file")
        return whole

    def _note(self, line: bytes) -> bool:
        """Whether the line is a result."""
        try:
            result = json.loads(line)
            name, custom_id, good = result["id"], result["custom_id"], succeeded(result)
            is_one = name.startswith(PREFIX)
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
        if is_one:
            self._done[name] = good
            if result["error"] is None:
                self._custom[custom_id] = name
        return is_one

    def __contains__(self, line: Line) -> bool:
        """Whether the line has its result.

        Raises InvalidArgument if there is one of another request with the same custom_id.
        """
        other = line.error is None and self._custom.get(line.custom_id, line.id) != line.id
        if other:
            raise InvalidArgument(
                f"line {line.number}: there is a result of another request with custom_id {line.custom_id!r}; "
                "choose another file for this batch"
            )
        return line.id in self._done

    def is_success(self, line: Line) -> bool:
        return self._done[line.id]

    def add(self, result: dict) -> None:
        self._file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


_BEGINNING = json.dumps({"id": PREFIX}).encode()[:-2]
