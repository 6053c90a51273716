"""The server under load, beside its engine alone: 1000 clients that stream at once, newcomers, arrivals at random.

    python benchmarks/run.py server [--clients 1000] [--rounds 2] [--minutes 6] [--max-tokens 16] [--threads 2]

An engine alone and `hf-paged serve`, each in a process of its own, take turns at the same requests: the tokens per second
that clients get over HTTP are a share of what the engine makes of them in the same minute. Every answer is compared with
the engine's own, token by token. The load generator runs beside the server on the same cores; its CPU time is told.
Linux only. Rows are appended to benchmarks/results/server.csv, the table also to server.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from hf_paged.benchmarks import schema

from . import report, scenarios
from .process import EngineAlone, Server
from .scenarios import Load, Newcomers, Question

REST = 60  # seconds, about: what comes after the rounds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        clients: that stream at once; they have one request each.
        rounds: of engine and server in turn; fewer where they would take more than `minutes` in all.
        max_tokens: of an answer.
        streams, visitors: newcomers that come to so many streams. The last has a prompt of `long` words.
        arrivals: requests that come at random moments, `pace` times as fast as the server made answers before.
    """

    clients: int = 1000
    rounds: int = 2
    minutes: float = 6.0
    max_tokens: int = 16
    streams: int = 32
    visitors: int = 8
    long: int = 1000
    arrivals: int = 120
    pace: float = 0.6


@dataclass
class Results:
    """All that was seen. `shares`: of each round, the server's tokens per second by the engine's."""

    plan: Plan
    about: dict
    engine: list[float] = field(default_factory=list)
    crowd: list[Load] = field(default_factory=list)
    newcomers: Newcomers | None = None
    arrivals: Load | None = None

    @property
    def shares(self) -> list[float]:
        return [load.rate / alone for load, alone in zip(self.crowd, self.engine, strict=True)]

    @property
    def problems(self) -> list[str]:
        loads = [*self.crowd, *([self.arrivals] if self.arrivals else [])]
        found = [f"lost: {reason}" for load in loads for reason in load.lost]
        found += [f"other tokens than the engine's own: {text!r}" for load in loads for text in load.wrong]
        return found + [f"newcomers: {reason}" for reason in (self.newcomers.problems if self.newcomers else ())]


def measure(model: str | None, plan: Plan, threads: int | None) -> Results:
    options = [] if threads is None else ["--threads", str(threads)]
    start = time.monotonic()
    with ExitStack() as stack:
        say("loading the engine alone, then the server")
        engine = stack.enter_context(closing(EngineAlone(model=model, threads=threads, max_num_seqs=64)))
        server = stack.enter_context(closing(Server(model, "--max-num-seqs", "64", *options)))
        results = Results(plan, engine.about)
        texts = engine.run("questions", count=plan.clients)["texts"]
        questions: list[Question] = []
        for turn in range(plan.rounds):
            begun = time.monotonic()
            if turn % 2:  # so that a machine that grows slower or faster favours neither
                _crowd(server, results, questions, turn)
                _alone(engine, results, texts, turn)
            else:
                questions = _alone(engine, results, texts, turn)
                _crowd(server, results, questions, turn)
            now = time.monotonic()
            if now - start + (now - begun) + REST > 60 * plan.minutes:
                break
        say(f"{plan.visitors} newcomers to an idle server, then to {plan.streams} streams")
        chosen = questions[: plan.streams + plan.visitors]
        long_text = " ".join(" ".join(texts).split()[: plan.long])
        results.newcomers = scenarios.newcomers(server, chosen, long_text, plan.streams, "newcomers")
        rate = plan.pace * plan.clients / median(load.seconds for load in results.crowd)
        say(f"{plan.arrivals} requests at random moments, {rate:.1f} a second")
        some = questions[: plan.arrivals]
        results.arrivals = scenarios.run(server, some, plan.max_tokens, "arrivals", rate)
    return results


def _alone(engine: EngineAlone, results: Results, texts: list[str], turn: int) -> list[Question]:
    run = engine.run("generate", texts=texts, max_tokens=results.plan.max_tokens, salt=f"crowd-{turn}")
    results.engine.append(sum(map(len, run["tokens"])) / run["seconds"])
    say(f"engine alone: {results.engine[-1]:.1f} tokens/s ({run['prompt_tokens']} prompt tokens, {run['seconds']:.1f} s)")
    return [Question(*each) for each in zip(texts, run["tokens"], run["texts"], strict=True)]


def _crowd(server: Server, results: Results, questions: list[Question], turn: int) -> None:
    load = scenarios.run(server, questions, results.plan.max_tokens, f"crowd-{turn}")
    results.crowd.append(load)
    say(
        f"{len(questions)} clients: {load.rate:.1f} tokens/s, {len(load.lost)} lost, {len(load.wrong)} wrong, "
        f"loop's lag {1e3 * load.lag:.1f} ms (p99), {1e6 * load.loop_per_token:.0f} us of the loop's and "
        f"{1e6 * load.client_per_token:.0f} us of the clients' CPU per token"
    )


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; by default the embedded model")
    parser.add_argument("--minutes", type=float, default=Plan.minutes)
    for name in ("clients", "rounds", "max-tokens", "streams", "visitors", "long", "arrivals"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan, name.replace("-", "_")))
    parser.add_argument("--threads", type=int, help="CPU threads of the engine; default: torch's own")
    parser.add_argument("--out", type=Path, default=schema.results_folder())
    options = vars(parser.parse_args(arguments))
    model, threads, out = (options.pop(name) for name in ("model", "threads", "out"))
    results = measure(model, Plan(**options), threads)
    machine = schema.describe_machine("cpu", results.about["threads"])
    schema.append_rows(out / "server.csv", report.measures(results), machine)
    table = report.table(results, machine)
    (out / "server.md").write_text(table)
    print(table)
    for problem in results.problems[:20]:
        print(problem)
    print(f"rows appended to {out / 'server.csv'}")
    return 1 if results.problems else 0


if __name__ == "__main__":
    sys.exit(main())
