"""The tables of `hf-paged bench`, in Markdown: made of the rows of engine.csv and nothing else.

python benchmarks/run.py engine.report            # engine.md, the charts and README's part again, from engine.csv
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import schema
from .options import PARTS, SYSTEMS
from .systems import PAGED, STOCK_ONE

MIB = 2**20
BEGIN, END = "<!-- hf-paged bench -->", "<!-- end of hf-paged bench -->"
Row = dict[str, str]
SAME = ("model", "dtype", "device", "cpu", "threads")


def newest(path: Path) -> list[Row]:
    """Of each part, the rows of its newest run, on the machine and model of the newest of all."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"].startswith("engine.")]
    if not rows:
        return []
    last = max(rows, key=lambda row: row["date"])
    rows = [row for row in rows if all(row[name] == last[name] for name in SAME)]
    dates = {part: max((row["date"] for row in of(rows, part)), default="") for part in PARTS}
    return [row for part in PARTS for row in of(rows, part) if row["date"] == dates[part]]


def of(rows: Iterable[Row], part: str, metric: str | None = None) -> list[Row]:
    return [row for row in rows if row["benchmark"] == f"engine.{part}" and metric in (None, row["metric"])]


def detail(row: Row) -> dict:
    return json.loads(row["detail"]) if row["detail"] else {}


def value(row: Row) -> float:
    return float(row["p50"])


def ordered(rows: Iterable[Row]) -> list[str]:
    """The systems there are: stock's, hf_paged, then other servers."""
    there = dict.fromkeys(row["system"] for row in rows)
    known = [name for name in (*list(SYSTEMS.values())[1:], PAGED) if name in there]
    return known + [name for name in there if name not in known]


def machine_line(rows: Sequence[Row]) -> str:
    row = rows[-1]
    return (f"{Path(row['model']).name or row['model']}, {row['dtype']}, greedy; {row['cpu']}, threads: {row['threads']}, "
            f"device: {row['device']}; torch {row['torch']}, transformers {row['transformers']}; {row['date'][:10]}")  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """All tables of the parts there are."""
    parts = [machine_line(rows)]
    for title, table in (
        ("Throughput", throughput_table(rows)),
        ("Delays at rising rates, in ms: p50, p95 and p99", rates_table(rows)),
        ("Output tokens per second, so many requests under way", concurrency_table(rows)),
        ("Memory, in MiB", memory_table(rows)),
        ("Quantized weights", quantized_table(rows)),
        ("In short", summary_table(rows)),
    ):
        if table:
            parts += [f"**{title}**", table]
    steps = of(rows, "throughput", "own_time")
    parts += [steps_line(rows)] if steps else []
    parts += [f"{row['system']} was left out ({row['benchmark'].partition('.')[2]}): {detail(row)['reason']}"
              for row in rows if row["metric"] == "failed"]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def readme(rows: Sequence[Row]) -> str:
    """README's part, without its markers."""
    tables = [table for table in (throughput_table(rows), summary_table(rows)) if table]
    failed = [f"{row['system']} was left out: {detail(row)['reason']}" for row in rows if row["metric"] == "failed"]
    return "\n\n".join([machine_line(rows) + ":", *tables, *failed])


def write_readme(rows: Sequence[Row], path: Path) -> None:
    """Put README's part between its markers. Raises ValueError if they are not there."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{readme(rows)}\n{END}{after}", encoding="utf-8")


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    rules = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rules, *lines))


def throughput_table(rows: Sequence[Row]) -> str:
    rates, ratios = of(rows, "throughput", "output_tokens"), of(rows, "throughput", "speedup")
    if not rates:
        return ""
    faster = {(row["workload"], row["baseline"]): row for row in ratios}
    lines = []
    for workload in dict.fromkeys(row["workload"] for row in rates):
        here = {row["system"]: row for row in rates if row["workload"] == workload}
        for place, system in enumerate(ordered(here.values())):
            row, more = here[system], detail(here[system])
            name = f"{workload}: {more['requests']} requests" if not place else ""
            rate = f"**{value(row):.0f}**" if system == PAGED else f"{value(row):.1f}"
            lines.append((name, system, rate, _faster(faster.get((workload, system))), _same(system, more)))
    return _table(("workload", "system", "output tokens/s", "hf_paged is faster by", "same tokens"), lines, left=2)


def _faster(row: Row | None) -> str:
    if row is None:
        return ""
    spread = f" ({float(row['p20']):.1f} to {float(row['p80']):.1f})" if int(row["samples"]) > 1 else ""
    return f"{value(row):.1f}x{spread}"


def _same(system: str, more: dict) -> str:
    if "compared" in more:
        return f"{more['compared'] - more['different']} of {more['compared']}"
    return "other weights" if system == PAGED and more.get("quantization") else "the measure"


def rates_table(rows: Sequence[Row]) -> str:
    found = of(rows, "rates")
    values = {(row["system"], detail(row)["rate"], row["metric"]): value(row) for row in found if "rate" in detail(row)}
    lines = []
    for rate in rates_of(found):
        name = "all at once" if math.isinf(float(rate)) else f"{float(rate):.3g} a second"
        for system in ordered(found):
            if (system, rate, "served") in values:
                numbers = [values[system, rate, metric] for metric in ("served", "output_tokens")]
                delays = (
                    " / ".join(
                        _milliseconds(values[system, rate, f"{delay}_{share}"]) for share in ("p50", "p95", "p99")
                    )
                    for delay in ("ttft", "gap", "total")
                )
                lines.append((name, system, f"{numbers[0]:.2f}", f"{numbers[1]:.1f}", *delays))
                name = ""
    head = ("requests", "system", "served/s", "tokens/s", "first token", "between tokens", "end to end")
    return _table(head, lines, left=2) if lines else ""


def rates_of(found: Iterable[Row]) -> list[str]:
    return sorted({detail(row)["rate"] for row in found if "rate" in detail(row)}, key=float)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.0095 else f"{1000 * seconds:.1f}"


def concurrency_table(rows: Sequence[Row]) -> str:
    found = of(rows, "concurrency", "output_tokens")
    levels = sorted({detail(row)["concurrency"] for row in found})
    values = {(row["system"], detail(row)["concurrency"]): f"{value(row):.1f}" for row in found}
    lines = [(system, *(values.get((system, level), "") for level in levels)) for system in ordered(found)]
    return _table(("system", *map(str, levels)), lines) if found else ""


def memory_table(rows: Sequence[Row]) -> str:
    return _memory(rows, "memory")


def quantized_table(rows: Sequence[Row]) -> str:
    return _memory(rows, "quantized")


def _memory(rows: Sequence[Row], part: str) -> str:
    found = of(rows, part)
    values = {(row["system"], row["metric"]): value(row) for row in found}
    lines = [
        (system, *(f"{values[system, name] / MIB:.0f}" for name in ("weights", "kv_peak", "memory_peak")),
         f"{values[system, 'output_tokens']:.1f}")
        for system in ordered(found) if (system, "weights") in values
    ]  # fmt: skip
    return _table(("system", "weights, MiB", "KV cache at its peak", "both", "output tokens/s"), lines) if lines else ""


def summary_table(rows: Sequence[Row]) -> str:
    """A line for each part but throughput, a column for each system."""
    lines: list[tuple[str, dict[str, str]]] = []
    levels = of(rows, "concurrency", "output_tokens")
    if levels:
        most = max(detail(row)["concurrency"] for row in levels)
        here = {row["system"]: f"{value(row):.0f}" for row in levels if detail(row)["concurrency"] == most}
        one = {row["system"]: f"{value(row):.0f}" for row in levels if row["system"] == STOCK_ONE}
        lines.append((f"output tokens/s, {most} requests under way", one | here))
    full = [row for row in of(rows, "rates", "served") if detail(row).get("rate") == "inf"]
    if full:
        lines.append(("requests/s served at most", {row["system"]: f"{value(row):.2f}" for row in full}))
    for rate in rates_of(of(rows, "rates", "ttft_p95")):
        here = [row for row in of(rows, "rates", "ttft_p95") if detail(row)["rate"] == rate]
        if not math.isinf(float(rate)):
            cells = {row["system"]: f"{_milliseconds(value(row))} ms" for row in here}
            lines.append((f"first token, p95, at {float(rate):.3g} requests/s", cells))
    for metric, name in (("kv_peak", "KV cache at its peak"), ("memory_peak", "weights and KV cache")):
        found = of(rows, "memory", metric)
        if found:
            lines.append((name, {row["system"]: f"{value(row) / MIB:.0f} MiB" for row in found}))
    quantized = of(rows, "quantized", "weights")
    if quantized:
        name = f"weights, {detail(quantized[-1])['stored']}"
        lines.append((name, {PAGED: f"{value(quantized[-1]) / MIB:.0f} MiB"}))
    systems = ordered(
        row for part in ("rates", "concurrency", "memory") for row in of(rows, part) if row["metric"] != "failed"
    )
    body = [(name, *(cells.get(system, "") for system in systems)) for name, cells in lines]
    return _table(("", *systems), body) if body else ""


def steps_line(rows: Sequence[Row]) -> str:
    own, decode, prefill = (
        of(rows, "throughput", name)[-1] for name in ("own_time", "decode_tokens", "prefill_tokens")
    )
    shares = ", ".join(f"{name} {share:.1%}" for name, share in detail(own).items())
    return (f"With {own['workload']}, the engine's own time is {value(own):.1%} of a step ({shares}); "
            f"{value(decode):.0f} tokens/s decoded, {value(prefill):.0f} tokens/s of prompts.")  # fmt: skip


def write_all(folder: Path, readme_path: Path | None = None) -> list[Path]:
    """engine.md, the charts, and README's part if asked for, of the newest rows in engine.csv. Returns the files."""
    from . import charts

    rows = newest(folder / "engine.csv")
    (folder / "engine.md").write_text(markdown(rows), encoding="utf-8")
    if readme_path is not None:
        write_readme(rows, readme_path)
    return [folder / "engine.md", *charts.draw_all(rows, folder), *([readme_path] if readme_path else [])]


if __name__ == "__main__":
    for file in write_all(schema.results_folder(), schema.HERE.parent / "README.md"):
        print(file)
