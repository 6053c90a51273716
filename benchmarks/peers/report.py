"""What a load on servers came to: numbers, a Markdown table, a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import schema
from .load import Answer

METRICS = {"output_tokens": "1/s", "ttft_p50": "s", "ttft_p95": "s", "gap_p50": "s", "gap_p95": "s"}


@dataclass(frozen=True)
class Outcome:
    """One server under one load.

    Attributes:
        values: by METRICS. The first token's time (ttft) is counted from sending the request; a gap is the time between two
            events of a stream, which may bring several tokens.
        problems: of the requests that were not answered; nothing else counts them.
    """

    peer: str
    rate: float
    values: dict[str, float]
    answered: int
    problems: list[str] = field(default_factory=list)


def outcome(peer: str, rate: float, answers: Sequence[Answer]) -> Outcome:
    """Raises RuntimeError if no request was answered."""
    good = [answer for answer in answers if answer.problem is None and answer.times]
    problems = [answer.problem or "no text came" for answer in answers if answer not in good]
    if not good:
        raise RuntimeError(f"{peer} answered no request: {problems[0]}")
    first = [answer.times[0] for answer in good]
    gaps = [later - before for answer in good for before, later in zip(answer.times, answer.times[1:])] or [0.0]
    tokens = sum(answer.num_tokens for answer in good)
    values = {"output_tokens": tokens / max(answer.seconds for answer in good)}
    for name, samples in (("ttft", first), ("gap", gaps)):
        values |= {f"{name}_p50": schema.quantile(samples, 0.5), f"{name}_p95": schema.quantile(samples, 0.95)}
    return Outcome(peer, rate, values, len(good), problems)


def rate_name(rate: float) -> str:
    return "all at once" if math.isinf(rate) else f"{rate:g} a second"


def rows_of(outcomes: Sequence[Outcome], **common) -> list[schema.Measure]:
    return [
        schema.Measure(
            benchmark="peers", system=one.peer, metric=metric, unit=unit, samples=[one.values[metric]],
            **common | {"workload": f"{common['workload']}, {rate_name(one.rate)}"},
            detail={"rate": rate_name(one.rate), "answered": one.answered, "failed": len(one.problems)},
        )
        for one in outcomes
        for metric, unit in METRICS.items()
    ]  # fmt: skip


def table(outcomes: Sequence[Outcome]) -> str:
    """In Markdown."""
    lines = [
        "| requests | server | tokens/s | first token p50 (p95), ms | gap p50 (p95), ms | failed |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for one in outcomes:
        shown = {name: value if name == "output_tokens" else 1000 * value for name, value in one.values.items()}
        lines.append(
            f"| {rate_name(one.rate)} | {one.peer} | {shown['output_tokens']:.1f} | {shown['ttft_p50']:.0f} "
            f"({shown['ttft_p95']:.0f}) | {shown['gap_p50']:.1f} ({shown['gap_p95']:.1f}) | {len(one.problems)} |"
        )
    return "\n".join(lines)


def draw(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """A PNG: tokens per second, time to the first token and gaps by rate; p95 dashed. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    rates = list(dict.fromkeys(one.rate for one in outcomes))
    panels = figure.subplots(1, 3)
    for panel, name, label in zip(panels, ("output_tokens", "ttft", "gap"), ("output tokens/s", "first token, s", "gap, s")):
        for color, peer in enumerate(dict.fromkeys(one.peer for one in outcomes)):
            mine = {one.rate: one.values for one in outcomes if one.peer == peer}
            for metric, style in ((name, "-"),) if name == "output_tokens" else ((f"{name}_p50", "-"), (f"{name}_p95", "--")):
                places = [place for place, rate in enumerate(rates) if rate in mine]
                values = [mine[rates[place]][metric] for place in places]
                named = peer if style == "-" else None
                panel.plot(places, values, style, marker="o", color=f"C{color}", label=named)
        panel.set_xticks(range(len(rates)), [rate_name(rate) for rate in rates])
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.suptitle(title, fontsize=9, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144)
