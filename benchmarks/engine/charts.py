"""The charts of `hf-paged bench`, drawn from rows of engine.csv. A system has one color in all of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .report import MIB, Row, detail, machine_line, of, ordered, rates_of, value
from .systems import PAGED, STOCK_BATCH, STOCK_CONTINUOUS, STOCK_ONE

COLORS = {PAGED: "#1f6fb2", STOCK_ONE: "#8d99a3", STOCK_BATCH: "#e39b2d", STOCK_CONTINUOUS: "#5f9e4a"}
OTHERS = ("#8e5ea2", "#c8553d", "#2a9d9d", "#7a5c3e")
LINES = {"p50": "-", "p95": "--", "p99": ":"}


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A PNG for each part there is. Returns their paths; none without matplotlib, which is said."""
    if find_spec("matplotlib") is None:
        print("no charts: matplotlib is missing (pip install 'hf_paged[bench]')", file=sys.stderr)
        return []
    charts = {
        "engine.png": ("throughput", _draw_throughput),
        "engine_rates.png": ("rates", _draw_rates),
        "engine_concurrency.png": ("concurrency", _draw_concurrency),
        "engine_memory.png": ("memory", _draw_memory),
    }
    drawn = []
    for name, (part, draw) in charts.items():
        found = [row for row in of(rows, part) if row["metric"] != "failed"]
        if found and (part != "rates" or any(math.isfinite(float(rate)) for rate in rates_of(found))):
            draw(found, folder / name)
            drawn.append(folder / name)
    return drawn


def _figure(rows: Sequence[Row], title: str, width: float, panels: int = 1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(machine_line(rows), x=0.01, ha="left", fontsize=7.5, color="#666666")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _colors(systems: Sequence[str]) -> dict[str, str]:
    others = [name for name in systems if name not in COLORS]
    return COLORS | {name: OTHERS[place % len(OTHERS)] for place, name in enumerate(others)}


def _draw_throughput(rows: Sequence[Row], path: Path) -> None:
    rates = of(rows, "throughput", "output_tokens")
    workloads = list(dict.fromkeys(row["workload"] for row in rates))
    figure, axes = _figure(
        rows, "Output tokens per second, whole workloads", 1.5 + 4.6 * len(workloads), len(workloads)
    )
    faster = {(row["workload"], row["baseline"]): value(row) for row in of(rows, "throughput", "speedup")}
    for axis, workload in zip(axes, workloads, strict=True):
        here = {row["system"]: row for row in rates if row["workload"] == workload}
        systems = ordered(here.values())
        for place, system in enumerate(systems):
            row = here[system]
            rate, low, high = value(row), float(row["p20"]), float(row["p80"])
            spread = [[rate - low], [high - rate]] if int(row["samples"]) > 1 else None
            axis.bar(place, rate, 0.68, color=_colors(systems)[system], yerr=spread, ecolor="#444444", capsize=3)
            ratio = faster.get((workload, system))
            label = f"{rate:.3g}" + (f"\n(1/{ratio:.1f})" if ratio else "")
            axis.annotate(label, (place, max(rate, high)), (0, 4), textcoords="offset points", ha="center", fontsize=9)
        names = [
            system.replace(", ", ",\n").replace("continuous ", "continuous\n").replace("padded ", "padded\n")
            for system in systems
        ]
        axis.set_xticks(range(len(names)), names, fontsize=8.5)
        axis.set_title(f"{workload}: {detail(next(iter(here.values())))['requests']} requests", loc="left", fontsize=10)
        axis.margins(y=0.18)
    axes[0].set_ylabel("output tokens per second")
    figure.savefig(path, dpi=144)


def _draw_rates(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.ticker import LogLocator

    figure, axes = _figure(rows, "Delays at rising request rates (Poisson arrivals)", 14, 3)
    rates, systems = [rate for rate in rates_of(rows) if not math.isinf(float(rate))], ordered(rows)
    values = {(row["system"], detail(row)["rate"], row["metric"]): value(row) for row in rows}
    labels = {"ttft": "time to the first token", "gap": "time between tokens", "total": "end to end"}
    for axis, (delay, label) in zip(axes, labels.items(), strict=True):
        for system in systems:
            color = _colors(systems)[system]
            for share, line in LINES.items():
                metric = f"{delay}_{share}"
                places = [float(rate) for rate in rates if (system, rate, metric) in values]
                heights = [values[system, rate, metric] for rate in rates if (system, rate, metric) in values]
                width = 2 if share == "p50" else 1.2
                axis.plot(places, heights, line, color=color, marker="o", markersize=3.5, linewidth=width)
            if delay == "ttft" and (system, "inf", "served") in values:
                most = values[system, "inf", "served"]
                axis.axvline(most, color=color, linewidth=5, alpha=0.22)
        axis.set_title(label, loc="left", fontsize=10)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks([float(rate) for rate in rates], [f"{float(rate):.2g}" for rate in rates])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(_seconds)
        axis.set_xlabel("requests per second")
    _legend_of_rates(figure, systems, any((system, "inf", "served") in values for system in systems))
    figure.savefig(path, dpi=144)


def _seconds(value: float, place: int) -> str:
    return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"


def _legend_of_rates(figure, systems: Sequence[str], saturated: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_colors(systems)[system], linewidth=2.5, label=system) for system in systems]
    handles += [Line2D([], [], color="#444444", linestyle=line, label=share) for share, line in LINES.items()]
    if saturated:
        handles.append(Line2D([], [], color="#444444", linewidth=5, alpha=0.22, label="serves no more than this"))
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8.5)


def _draw_concurrency(rows: Sequence[Row], path: Path) -> None:
    figure, (axis,) = _figure(rows, "Throughput against concurrency", 8.5)
    levels, systems = sorted({detail(row)["concurrency"] for row in rows}), ordered(rows)
    for system in systems:
        points = sorted((detail(row)["concurrency"], value(row)) for row in rows if row["system"] == system)
        color = _colors(systems)[system]
        if system == STOCK_ONE:
            axis.axhline(points[0][1], color=color, linestyle="--", linewidth=1.5, label=f"{system} (whatever waits)")
        else:
            axis.plot(*zip(*points), color=color, marker="o", markersize=4, linewidth=2, label=system)
            axis.annotate(
                f"{points[-1][1]:.0f}", points[-1], (6, -3), textcoords="offset points", color=color, fontsize=9
            )
    axis.set_xscale("log", base=2)
    axis.set_xticks(levels, [str(level) for level in levels])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("requests under way (stock's padded batches: their size)")
    axis.set_ylabel("output tokens per second")
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=144)


def _draw_memory(rows: Sequence[Row], path: Path) -> None:
    found = of(rows, "memory", "kv_peak")
    more = detail(found[0])
    figure, (axis,) = _figure(rows, f"KV cache over time: {more['requests']} requests, mixed lengths, all at once", 8.5)
    systems = ordered(found)
    for system in systems:
        row = next(row for row in found if row["system"] == system)
        over_time, color = detail(row), _colors(systems)[system]
        seconds, held = over_time["seconds"], [size / MIB for size in over_time["bytes"]]
        label = f"{system}: at most {value(row) / MIB:.3g} MiB, done in {seconds[-1]:.3g} s"
        axis.plot([0, *seconds], [0, *held], color=color, linewidth=1.8, label=label)
        axis.plot(seconds[-1], held[-1], "o", color=color, markersize=4)
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.set_xlabel("seconds")
    axis.set_ylabel("MiB that requests hold (keys and values)")
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    figure.savefig(path, dpi=144)
