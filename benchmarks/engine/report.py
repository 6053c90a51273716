"""What a benchmark run prints, and its chart."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from hf_paged.benchmarks.schema import Machine, quantile

from .systems import PAGED

if TYPE_CHECKING:
    from .bench import Profile, Result

COLORS = ("#2f6f9f", "#b9c4cc", "#8797a3")
MIB = 2**20


def print_report(results: list[Result], profile: Profile | None, machine: Machine) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"\n{machine.cpu}, device {machine.device}, {machine.threads} threads, torch {machine.torch}, "
        f"transformers {machine.transformers}, commit {machine.commit}",
        soft_wrap=True,
    )
    table = Table(title="Output tokens per second (speed-up: median, smallest to largest round)")
    for name in ("workload", "system", "runs", "tokens/s", "hf_paged is faster by", "same tokens"):
        table.add_column(name, justify="left" if name in ("workload", "system") else "right")
    for result in results:
        for system, runs in result.runs.items():
            table.add_row(
                result.work.name,
                system,
                str(len(runs)),
                f"{overall_rate(runs):.1f}",
                _ratio(result.ratios.get(system)),
                _equality(result, system),
            )
    console.print(table)
    for result in results:
        for system, differences in result.differences.items():
            for difference in differences[:8]:
                console.print(f"{result.work.name}, {system}: {difference}", soft_wrap=True)
    if profile:
        _print_profile(console, profile)


def _print_profile(console, profile: Profile) -> None:
    saved = 1 - profile.kv_bytes / profile.static_bytes
    shares = ", ".join(f"{name} {share:.1%}" for name, share in profile.shares.items())
    console.print(
        f"At {profile.running} running requests: the engine's own time is {profile.own_share:.1%} of a step ({shares});\n"
        f"decode {profile.decode_rate:.0f} tokens/s, prefill {profile.prefill_rate:.0f} tokens/s; KV peak "
        f"{profile.kv_bytes / MIB:.0f} MiB, padded static batch {profile.static_bytes / MIB:.0f} MiB: "
        f"{saved:.0%} less; {profile.preemptions} preemptions.",
        soft_wrap=True,
    )


def overall_rate(runs) -> float:
    return sum(run.output_tokens for run in runs) / sum(run.seconds for run in runs)


def _ratio(ratios: list[float] | None) -> str:
    return f"{median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})" if ratios else ""


def _equality(result: Result, system: str) -> str:
    if system == PAGED and system not in result.compared:
        return "other weights" if len(result.runs) > 1 else ""
    if system not in result.compared:
        return "the measure" if len(result.runs) > 1 else ""
    compared, different = result.compared[system], len(result.differences[system])
    return f"{compared - different} of {compared}"


def draw_chart(results: list[Result], machine: Machine, path: Path) -> Path | None:
    """Bars of tokens per second with p20 to p80 whiskers, one panel per workload. None without matplotlib."""
    if find_spec("matplotlib") is None:
        print("no chart: matplotlib is missing (pip install 'hf_paged[bench]')")
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 4.4 * len(results), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, result in zip(panels, results, strict=True):
        _draw_panel(panel, result)
    panels[0].set_ylabel("output tokens per second")
    figure.suptitle(f"{machine.cpu}, {machine.threads} threads, {machine.device}", fontsize=9, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144)
    return path


def _draw_panel(panel, result: Result) -> None:
    for place, (system, runs) in enumerate(result.runs.items()):
        rates = [run.rate for run in runs]
        rate = overall_rate(runs)
        low, high = (quantile(rates, share) for share in (0.2, 0.8))
        error = [[max(rate - low, 0)], [max(high - rate, 0)]]
        panel.bar(place, rate, 0.66, yerr=error, color=COLORS[place % len(COLORS)], ecolor="#444444", capsize=3)
        ratios = result.ratios.get(system)
        label = f"{rate:.0f}" if system == PAGED or not ratios else f"{rate:.0f}\n(1/{median(ratios):.1f})"
        panel.annotate(label, (place, max(rate, high)), (0, 4), textcoords="offset points", ha="center")
    names = [system.replace(", ", ",\n") for system in result.runs]
    panel.set_xticks(range(len(names)), names)
    panel.set_title(f"{result.work.name}: {len(result.work.requests)} requests", loc="left", fontsize=11)
    panel.margins(y=0.18)
    panel.spines[["top", "right"]].set_visible(False)
