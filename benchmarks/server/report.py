"""Rows and the table of `benchmarks.server`."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from hf_paged.benchmarks.schema import Machine, Measure, quantile

from .scenarios import Load

MIB = 2**20


def measures(results) -> Iterator[Measure]:
    plan, about = results.plan, results.about
    common = dict(benchmark="server", model=about["model"], dtype=about["dtype"])
    crowd = dict(common, workload=f"{plan.clients} clients", detail=dict(max_tokens=plan.max_tokens))
    yield Measure(**crowd, system="engine", metric="output_tokens", unit="1/s", samples=results.engine)
    shared = dict(crowd, system="http")
    yield Measure(**shared, metric="output_tokens", unit="1/s", samples=[load.rate for load in results.crowd])
    yield Measure(**shared, metric="share", unit="ratio", samples=results.shares, baseline="engine")
    yield from _load(shared, results.crowd)
    yield from _load(dict(common, workload="random arrivals", system="http"), [results.arrivals])
    come = dict(common, system="http", metric="first_token", unit="s")
    yield Measure(**come, workload="newcomer, idle server", samples=results.newcomers.idle)
    yield Measure(**come, workload=f"newcomer, {plan.streams} streams", samples=results.newcomers.beside)
    yield Measure(**come, workload=f"long prompt, {plan.streams} streams", samples=[results.newcomers.long])
    come |= dict(metric="between_tokens")
    yield Measure(**come, workload=f"{plan.streams} streams", samples=results.newcomers.step)
    beside = results.newcomers.step_beside_long
    yield Measure(**come, workload=f"{plan.streams} streams, long prompt", samples=beside)
    come |= dict(metric="between_tokens_most")
    yield Measure(**come, workload=f"{plan.streams} streams, long prompt", samples=[max(beside)])


def _load(shared: dict, loads: list[Load]) -> Iterator[Measure]:
    yield Measure(**shared, metric="lost", unit="1", samples=[len(load.lost) for load in loads])
    yield Measure(**shared, metric="wrong", unit="1", samples=[len(load.wrong) for load in loads])
    first = [seconds for load in loads for seconds in load.first_token]
    between = [seconds for load in loads for seconds in load.between_tokens]
    for metric, seconds in (("first_token", first), ("between_tokens", between)):
        yield Measure(**shared, metric=metric, unit="s", samples=seconds)
        yield Measure(**shared, metric=f"{metric}_p99", unit="s", samples=[quantile(seconds, 0.99)])
    yield Measure(**shared, metric="tokens_per_event", unit="1", samples=[load.tokens_per_event for load in loads])
    yield Measure(**shared, metric="loop_lag_p99", unit="s", samples=[load.lag for load in loads])
    yield Measure(**shared, metric="loop_cpu_per_token", unit="s", samples=[load.loop_per_token for load in loads])
    yield Measure(**shared, metric="client_cpu_per_token", unit="s", samples=[load.client_per_token for load in loads])
    yield Measure(**shared, metric="memory_before", unit="bytes", samples=[load.resident[0] for load in loads])
    yield Measure(**shared, metric="memory_peak", unit="bytes", samples=[max(load.resident) for load in loads])
    yield Measure(**shared, metric="memory_after", unit="bytes", samples=[load.resident[-1] for load in loads])


def table(results, machine: Machine) -> str:
    """Markdown."""
    plan, crowd, come = results.plan, results.crowd, results.newcomers
    requests = sum(len(load.answers) for load in crowd)
    first, last = crowd[0], crowd[-1]
    rows = [
        (f"answers to {plan.clients} clients at once, {len(crowd)} round{'s' * (len(crowd) > 1)}", f"{requests}: "
         f"{sum(len(load.lost) for load in crowd)} lost, {sum(len(load.wrong) for load in crowd)} wrong"),
        ("tokens/s over HTTP", _spread([load.rate for load in crowd], 1, 1)),
        ("tokens/s of the engine alone", _spread(results.engine, 1, 1)),
        ("**share of the engine's own**", f"**{_spread(results.shares, 100, 1)} %**"),
        ("event loop's lag, p99", f"{_spread([load.lag for load in crowd], 1e3, 1)} ms"),
        ("event loop's CPU time per token", f"{_spread([load.loop_per_token for load in crowd], 1e6, 0)} us"),
        ("load generator's CPU time per token", f"{_spread([load.client_per_token for load in crowd], 1e6, 0)} us"),
        ("tokens per event", _spread([load.tokens_per_event for load in crowd], 1, 3)),
        ("server's memory before, at most, after", f"{first.resident[0] / MIB:.0f}, "
         f"{max(max(load.resident) for load in crowd) / MIB:.0f}, {last.resident[-1] / MIB:.0f} MiB"),
        ("first token on an idle server", f"{_spread(come.idle, 1e3, 0)} ms"),
        (f"first token while {plan.streams} others stream", f"{_spread(come.beside, 1e3, 0)} ms"),
        ("time between two tokens of those", f"{1e3 * median(come.step):.0f} ms"),
        (f"the same while a prompt of {plan.long} words is computed, median and longest",
         f"{1e3 * median(come.step_beside_long):.0f} and {1e3 * max(come.step_beside_long):.0f} ms"),
        ("first token of that prompt", f"{1e3 * come.long:.0f} ms"),
        (f"{plan.arrivals} random arrivals: lost, wrong", f"{len(results.arrivals.lost)}, {len(results.arrivals.wrong)}"),
        ("their first token, median and p99", _two(results.arrivals.first_token)),
        ("time between their tokens, median and p99", _two(results.arrivals.between_tokens)),
    ]  # fmt: skip
    lines = [
        f"{results.about['model']}, {results.about['dtype']}, {machine.threads} threads, {machine.cpu}, {machine.date}, "
        f"commit {machine.commit}; answers of up to {plan.max_tokens} tokens; medians (smallest to largest).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
    ]
    return "\n".join(lines) + "\n"


def _spread(samples: list[float], scale: float, digits: int) -> str:
    middle, low, high = (f"{scale * value:.{digits}f}" for value in (median(samples), min(samples), max(samples)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _two(seconds: list[float]) -> str:
    return f"{1e3 * quantile(seconds, 0.5):.0f} and {1e3 * quantile(seconds, 0.99):.0f} ms"
