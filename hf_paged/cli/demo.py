"""`hf-paged demo`: a real model chats, then the same requests run through stock transformers and through hf_paged."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from tqdm import tqdm

import hf_paged
from hf_paged.benchmarks.engine import systems
from hf_paged.benchmarks.engine.systems import BATCH, PAGED, STOCK_BATCH, STOCK_ONE, Run
from hf_paged.benchmarks.engine.workload import Request

from .common import chat_tokens, check_alone, load
from .demo_prompts import CHAT_QUESTIONS, prompts

MIB = 2**20
CHAT_TOKENS = 64


def run_demo(name: str | None, count: int, device: str | None, threads: int | None) -> bool:
    """Returns whether every token was the same."""
    import torch

    start = time.perf_counter()
    console = Console(soft_wrap=not sys.stdout.isatty())
    check_alone("demo")
    model, tokenizer = load(model=name, dtype=None, device=device, threads=threads, progress=True)
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    console.print(
        f"{model.config._name_or_path} in {str(model.dtype).removeprefix('torch.')} on {where}, "
        f"{torch.get_num_threads()} threads"
    )

    console.rule(f"{len(CHAT_QUESTIONS)} chats at the same time, one engine")
    with _patched(model, tokenizer) as engine:
        _chat(console, engine, tokenizer)

    requests = _requests(tokenizer, count)
    tokens = sum(len(request.prompt) for request in requests)
    console.rule(f"{count} mixed requests ({tokens} prompt tokens), stock and hf_paged")
    runs = _compare_systems(model, tokenizer, requests)
    differences = _differences(model, requests, runs)
    console.print(_table(runs, requests))
    static = systems.static_batch_bytes(systems.kv_bytes_per_token(model), requests, count)
    console.print(
        f"KV peak: with 1, {min(BATCH, count)} and {count} requests at once; one padded stock batch of "
        f"all {count} would hold {static / MIB:.0f} MiB."
    )
    compared = sum(map(len, runs[STOCK_ONE].tokens))
    if differences:
        console.print(f"[bold red]{len(differences)} of {len(requests)} requests differ from stock:[/]")
        for difference in differences:
            console.print(f"  {difference}")
    else:
        console.print(f"[bold green]Every token is the same[/]: {compared} of {compared}, in {len(requests)} requests.")
    faster = runs[PAGED].rate / runs[STOCK_ONE].rate
    console.print(f"{faster:.1f} times stock transformers. The whole demo took {time.perf_counter() - start:.0f} s.")
    return not differences


@contextmanager
def _patched(model, tokenizer) -> Iterator:
    """The one added line of the README, and its opposite."""
    hf_paged.patch(model, tokenizer=tokenizer)
    try:
        yield hf_paged.engine_of(model)
    finally:
        hf_paged.unpatch(model)


# ---- chats -----------------------------------------------------------------------------------------------------------


@dataclass
class _Answer:
    question: str
    text: str = ""
    printed: int = 0
    finished: bool = False


def _chat(console: Console, engine, tokenizer) -> None:
    params = systems.greedy(CHAT_TOKENS)
    answers = {}
    for question in CHAT_QUESTIONS:
        prompt = chat_tokens(tokenizer, [{"role": "user", "content": question}])
        answers[engine.add(prompt, params)] = _Answer(question)
    start, count = time.perf_counter(), 0
    with _screen(console, answers) as show:
        while engine.has_unfinished():
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                answer = answers[output.request_id]
                answer.text, answer.finished = output.outputs[0].text, output.finished
                if output.finished:
                    count += len(output.outputs[0].token_ids)
            show()
    seconds = time.perf_counter() - start
    console.print(f"{count} tokens in {seconds:.1f} s: {count / seconds:.0f} tokens/s over {len(answers)} chats")


@contextmanager
def _screen(console: Console, answers: dict[str, _Answer]) -> Iterator:
    """A function that shows the answers as they stand: side by side on a terminal, else line by line."""
    if not console.is_terminal:
        yield lambda: _show_lines(answers)
        return

    def panels() -> Columns:
        width = max(30, console.width // 2 - 2)
        boxes = [
            Panel(a.text.strip() or " ", title=a.question, title_align="left", width=width, height=11)
            for a in answers.values()
        ]
        return Columns(boxes)

    with Live(panels(), console=console, refresh_per_second=12) as live:
        yield lambda: live.update(panels())
        live.update(panels())


def _show_lines(answers: dict[str, _Answer], width: int = 72) -> None:
    """Print what has become a full line since the last call, with the number of its chat."""
    for number, answer in enumerate(answers.values(), 1):
        while True:
            rest = answer.text[answer.printed :]
            line = _full_line(rest, width) or (rest if answer.finished else "")
            if not line:
                break
            answer.printed += len(line)
            if line.strip():
                print(f"[{number}] {line.strip()}", flush=True)


def _full_line(text: str, width: int) -> str:
    """The first line of `text`, its end included, cut at a space once it is longer than `width`."""
    line, newline, _ = text.partition("\n")
    if newline and len(line) <= width:
        return line + newline
    return line[: line.rfind(" ", 0, width) + 1] if len(line) > width else ""


# ---- the same requests, three ways -----------------------------------------------------------------------------------


def _requests(tokenizer, count: int) -> list[Request]:
    """Chat prompts of very different lengths, each with its own limit of 8 to 40 new tokens."""
    return [
        Request(tuple(chat_tokens(tokenizer, messages)), 8 + 8 * (index * 7 % 5))
        for index, messages in enumerate(prompts(count))
    ]


def _compare_systems(model, tokenizer, requests: list[Request]) -> dict[str, Run]:
    """The same model object for all: untouched for stock, patched for hf_paged's turn only."""
    runs = {}
    for system, batch in ((STOCK_ONE, 1), (STOCK_BATCH, BATCH)):
        with _bar(system, requests) as advance:
            runs[system] = systems.run_stock(model, requests, batch=batch, progress=advance)
    with _patched(model, tokenizer) as engine, _bar(PAGED, requests) as advance:
        runs[PAGED] = systems.run_paged(engine, requests, progress=advance)
    return runs


@contextmanager
def _bar(system: str, requests: list[Request]) -> Iterator:
    with tqdm(total=len(requests), desc=f"{system:28}", unit="request", file=sys.stderr) as bar:
        yield lambda _tokens: bar.update()


def _differences(model, requests: list[Request], runs: dict[str, Run]) -> list[systems.Difference]:
    found = (
        systems.first_difference(model, index, request, expected, got)
        for index, (request, expected, got) in enumerate(
            zip(requests, runs[STOCK_ONE].tokens, runs[PAGED].tokens, strict=True)
        )
    )
    return [difference for difference in found if difference]


def _table(runs: dict[str, Run], requests: list[Request]) -> Table:
    table = Table(box=SIMPLE_HEAD, title="greedy, the same prompts and limits for all", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("seconds", "tokens/s", "speed-up", "same tokens", "KV peak"):
        table.add_column(name, justify="right", no_wrap=True)
    truth = runs[STOCK_ONE]
    for system, run in runs.items():
        same = sum(a == b for a, b in zip(truth.tokens, run.tokens, strict=True))
        table.add_row(
            system,
            f"{run.seconds:.1f}",
            f"{run.rate:.1f}",
            f"{run.rate / truth.rate:.1f}x",
            f"{same} of {len(requests)}",
            f"{run.kv_bytes / MIB:.0f} MiB",
        )
    return table
