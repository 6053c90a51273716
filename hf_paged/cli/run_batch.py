"""`hf-paged run-batch`: a file of requests in OpenAI's batch format."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing, closing
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .common import UserError, open_engine

if TYPE_CHECKING:
    from fastapi import FastAPI

    from hf_paged.integrations.openai.batch import Line, Results


def run_batch(source: Path, target: Path, most: int, settings: dict, loading: dict) -> int:
    """Answer all lines that have no result yet. Returns 1 if any line, now or before, has no answer of status 200.

    Args:
        most: requests under way at once.
    """
    try:
        from hf_paged.integrations.openai import Settings, create_app
        from hf_paged.integrations.openai.batch import Results
    except ImportError as error:
        raise UserError(f"hf-paged run-batch needs {error.name}: pip install hf_paged[server]") from None
    with ExitStack() as stack:
        file = os.fdopen(os.dup(0), "rb") if str(source) == "-" else source.open("rb")
        if _is_plain(file):
            stack.enter_context(file)  # anything else may be read by a thread, for which closing would wait
        if target.exists() and os.path.samestat(os.fstat(file.fileno()), target.stat()):
            raise UserError(f"{target} cannot be both the requests and their results")
        results = Results(os.fdopen(os.dup(1), "wb")) if str(target) == "-" else Results.resume(target)
        stack.enter_context(closing(results))
        _, _, engine = stack.enter_context(open_engine(**loading))
        run = _Run(file, results, create_app(engine, Settings(**settings)))
        asyncio.run(run.through(most, progress=loading["progress"]))
    if loading["progress"]:
        print(f"{run.lines} lines: {run.before} answered before, {run.failed} failed", file=sys.stderr)
    return int(run.failed > 0)


class _Run:
    """From the lines of `file` to `results`.

    Attributes:
        lines, before, failed: how many there were, had a result already, and have one that is no success.
    """

    def __init__(self, file: BinaryIO, results: Results, app: FastAPI):
        from hf_paged.integrations.openai.batch import LineReader, urls_of

        self._file, self._results, self._app = file, results, app
        self._most_bytes = app.state.service.settings.limits.body_bytes
        self._reader = LineReader(urls_of(app), self._most_bytes)
        self.lines = self.before = self.failed = 0

    async def through(self, most: int, *, progress: bool) -> None:
        from tqdm import tqdm

        from hf_paged.integrations.openai.batch import Runner, read_lines, succeeded

        total = None
        if progress and _is_plain(self._file):
            total = sum(1 for _ in read_lines(self._file, self._most_bytes))
            self._file.seek(0)
        tokens = 0
        with tqdm(total=total, unit="request", disable=not progress, file=sys.stderr) as bar:
            async with aclosing(Runner(self._app, most=most).results(self._missing(bar))) as results:
                async for result in results:
                    self._results.add(result)
                    self.failed += not succeeded(result)
                    tokens += _tokens_of(result)
                    bar.set_postfix(tokens=tokens, failed=self.failed, refresh=False)
                    bar.update()

    async def _missing(self, bar) -> AsyncIterator[Line]:
        """The lines without a result."""
        from hf_paged.integrations.openai.batch import from_thread, read_lines

        lines = read_lines(self._file, self._most_bytes)
        async for number, text in _at_once(lines) if _is_plain(self._file) else from_thread(lines):
            line = self._reader.parse(number, text)
            self.lines += 1
            if line not in self._results:
                yield line
                continue
            self.before += 1
            self.failed += not self._results.is_success(line)
            bar.update()
            await asyncio.sleep(0)  # so that a long file can be interrupted


def _is_plain(file: BinaryIO) -> bool:
    return stat.S_ISREG(os.fstat(file.fileno()).st_mode)


async def _at_once(lines):
    for line in lines:
        yield line


def _tokens_of(result: dict) -> int:
    """Tokens that were generated."""
    body = result["response"] and result["response"]["body"]
    usage = body.get("usage") if isinstance(body, dict) else None
    return (usage or {}).get("completion_tokens") or (usage or {}).get("output_tokens") or 0
