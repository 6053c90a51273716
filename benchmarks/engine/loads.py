"""Requests that come over time: delays at rising rates, and throughput at rising concurrency.

At each rate (or number of requests under way) every system gets the same requests at the same moments, one system after
another; at the next one the prompts are others, so that nobody has them cached. Other servers take part by their address.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Sequence

from hf_paged.hf.patch import led

from ..latency import METRICS, Answer, Feed, Outcome, arrivals, outcome, rate_name
from ..peers.load import load
from . import systems
from .continuous import run_continuous
from .systems import BATCH, PAGED, STOCK_BATCH, STOCK_CONTINUOUS, STOCK_ONE
from .workload import Request

MORE_AT_ONCE = 4  # times as many requests show what a system serves at most
HOPELESS = 2.0  # times what a system serves: beyond that its queue only grows, and delays say how long the run was


def measure_rates(bench) -> None:
    """All at once first, which tells what each system serves at most; then rate by rate."""
    options, served = bench.options, {}
    players = _players(bench)
    rates = [math.inf, *sorted(rate for rate in options.rates if not math.isinf(rate))]
    turn = 0
    while turn < len(rates):
        rate = rates[turn]
        count = options.scale.load_requests * (1 if turn else MORE_AT_ONCE)
        work = options.work(options.load_workload, bench.tokenizer, turn=turn, count=count)
        for system in players:
            if turn and not options.rates and rate > HOPELESS * served.get(system, 0):
                continue
            bench.say(f"rates, {rate_name(rate)}: {system}")
            # Stock one at a time serves as many a second however many wait, and is slow.
            requests = work.requests[: options.scale.load_requests] if system == STOCK_ONE else work.requests
            result = _outcome(bench, "rates", system, rate, requests, arrivals(len(requests), rate, options.seed))
            if result is not None:
                served[system] = max(served.get(system, 0), result.values["served"])
                workload = f"{work.name}, {rate_name(rate)}"
                _add_rows(bench, "rates", result, workload, {"rate": str(rate), "requests": len(requests)}, METRICS)
        if turn == 0 and not options.rates and served:
            slowest = served.get(STOCK_ONE, min(served.values()))
            rates += [float(f"{multiple * slowest:.2g}") for multiple in options.scale.multiples]
        turn += 1


def measure_concurrency(bench) -> None:
    """So many requests under way at any time; stock's padded batches are of as many. One at a time has one rate for all."""
    options, players = bench.options, _players(bench)
    for turn, level in enumerate(options.levels):
        count = level * max(1, options.scale.load_requests // 4 // level)
        work = options.work(options.load_workload, bench.tokenizer, turn=100 + turn, count=count)
        if len(work.requests) < level:
            bench.bar.write(f"{work.name} has too few requests for {level} under way", file=sys.stderr)
            continue
        for system in players:
            if system == STOCK_ONE and turn:
                continue
            bench.say(f"concurrency, {level} under way: {system}")
            result = _outcome(bench, "concurrency", system, math.inf, work.requests, [0.0] * len(work.requests), level)
            if result is not None:
                detail = {"concurrency": level, "requests": len(work.requests)}
                wanted = {"output_tokens": METRICS["output_tokens"]}
                _add_rows(bench, "concurrency", result, f"{work.name}, {level} under way", detail, wanted)


def _players(bench) -> list[str]:
    return [*bench.systems, *(peer.name for peer in bench.options.peers)]


def _outcome(
    bench, part: str, system: str, rate: float, requests: Sequence[Request], due: list[float], most: int | None = None
) -> Outcome | None:
    """None if the system failed, now or before; the reason is in a row."""
    if system in bench.failed:
        return None
    answers = _answers(bench, part, system, requests, due, most)
    if answers is None:
        return None
    try:
        result = outcome(system, rate, answers)
    except RuntimeError as error:  # a server that answers nothing
        bench.failed[system] = str(error)
        more = dict(workload="all", system=system, metric="failed", unit="1", samples=[1])
        bench.add(part, **more, detail={"reason": str(error)[:300]})
        bench.bar.write(f"{error}; it is left out from here on", file=sys.stderr)
        return None
    for problem in dict.fromkeys(result.problems):
        bench.bar.write(f"{system}: {problem}", file=sys.stderr)
    return result


def _answers(
    bench, part: str, system: str, requests: Sequence[Request], due: list[float], most: int | None
) -> list[Answer] | None:
    options = bench.options
    more = {"ignore_eos": True, "progress": bench.bar.update, "feed": Feed(due, most)}
    if system == PAGED:
        salt = f"{part}-{due[-1]}-{most}"
        return led(bench.paged, lambda engine: systems.run_paged(engine, requests, cache_salt=salt, **more)).answers
    if system == STOCK_CONTINUOUS:
        run = bench.try_continuous(part, lambda: run_continuous(bench.stock, requests, **more))
        return run.answers if run is not None else None
    if system in (STOCK_ONE, STOCK_BATCH):
        batch = 1 if system == STOCK_ONE else most or BATCH
        return systems.run_stock(bench.stock, requests, batch=batch, **more).answers
    peer = next(peer for peer in options.peers if peer.name == system)
    return asyncio.run(load(peer, bench.served[system], requests, due, most=most, headers=options.peer_headers))


def _add_rows(bench, part: str, result: Outcome, workload: str, detail: dict, metrics: dict[str, str]) -> None:
    detail = detail | {"answered": result.answered, "failed": len(result.problems)}
    for metric, unit in metrics.items():
        more = dict(workload=workload, system=result.system, metric=metric, unit=unit, samples=[result.values[metric]])
        bench.add(part, **more, detail=detail)
