"""Which tiles are fastest: tries others than a launcher's own, one knob after the other, and prints the best per shape.

    python -m hf_paged.benchmarks.gpu.kernels --sweep [--minutes 7.5]

Starting from the launcher's choice each knob takes its other values while the rest stay; the fastest is kept, and once
more through all knobs. A configuration that does not compile or fit is passed over; one whose result differs from that
of the launcher's choice is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hf_paged_kernels.triton.launch import tuning

from .checking import BOUNDS, compare
from .kernels_attention import TINY_DECODE, TINY_PREFILL, decode_candidates, prefill_candidates, ratios
from .kernels_layers import TINY_LINEAR_ROWS, linear_candidates
from .session import Session
from .timing import measure

ROUNDS, TINY_ROUNDS = 7, 1
PASSES = 2
GAIN = 0.98  # of the time: less is noise
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "decode": dict(tile=(16, 32, 64, 128), num_stages=(2, 3, 4, 5), num_warps=(2, 4, 8), waves=(1, 2, 4, 8)),
    "prefill": dict(block_m=(64, 128), tile=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4)),
    "linear": dict(columns=(16, 32, 64, 128), depth=(64, 128, 256, 512), num_warps=(2, 4, 8), num_stages=(3, 4, 5, 6)),
}
TINY_KNOBS = {
    "decode": dict(tile=(16, 32)),
    "prefill": dict(tile=(16, 32)),
    "linear": dict(depth=(32, 64)),
}
DECODE = [(1, 4096), (8, 4096), (64, 1024), (256, 1024), (1, 32768)]
PREFILL = [4096, 16384]
LINEAR_ROWS = (1, 8, 32)


@dataclass(frozen=True)
class Problem:
    """One shape of one kernel: `make` builds its inputs and returns (run(i), number of input sets)."""

    kernel: str
    model: str
    name: str
    make: Callable[[], tuple[Callable[[int], torch.Tensor], int]]


def sweep(session: Session) -> None:
    for problem in problems(session):
        if session.clock.left < 0:
            return session.report.skip(f"sweep from {problem.kernel} {problem.model} {problem.name} on", "out of time")
        session.report.attempt(
            f"sweep of {problem.kernel} {problem.name}",
            lambda: _search(session, problem),  # noqa: B023
        )


def problems(session: Session) -> Iterator[Problem]:
    few = slice(1 if session.tiny else None)
    for shape in list(session.shapes.values())[few]:
        for name, (rows, columns) in list(shape.linears().items())[few]:
            for count in TINY_LINEAR_ROWS[:1] if session.tiny else LINEAR_ROWS:
                yield Problem(
                    "linear", shape.name, f"{name}, {count} rows",
                    lambda: _ours(linear_candidates(session, name, rows, columns, count)),  # noqa: B023
                )  # fmt: skip
        for count, length in TINY_DECODE[:1] if session.tiny else DECODE:
            yield Problem(
                "decode", shape.name, f"{count} x {length}",
                lambda: _ours(decode_candidates(session, shape, count, length, session.dtype)),  # noqa: B023
            )  # fmt: skip
        for length in TINY_PREFILL if session.tiny else PREFILL:
            yield Problem(
                "prefill", shape.name, str(length),
                lambda: _ours(prefill_candidates(session, shape, length)),  # noqa: B023
            )  # fmt: skip


def _ours(candidates: tuple[dict, int]) -> tuple[Callable[[int], torch.Tensor], int]:
    """Our kernel with everything that the engine has it do."""
    runs, sets = candidates
    return [run for name, run in runs.items() if name.startswith("hf_paged")][-1], sets


def _search(session: Session, problem: Problem) -> None:
    run, sets = problem.make()
    expected = run(0)
    rounds = TINY_ROUNDS if session.tiny else ROUNDS
    best: dict[str, int] = {}
    knobs, passes = (TINY_KNOBS, 1) if session.tiny else (KNOBS, PASSES)
    for knob, values in list(knobs[problem.kernel].items()) * passes:
        candidates = {"best": _with(problem.kernel, run, best)}
        for value in values:
            tried = best | {knob: value}
            if tried != best and _right(problem, run, tried, expected):
                candidates[value] = _with(problem.kernel, run, tried)
        timings = measure(candidates, sets, session.device, rounds=rounds)
        fastest = min(timings, key=lambda name: timings[name].median)
        if timings[fastest].median < GAIN * timings["best"].median:
            best = best | {knob: fastest}
        if session.clock.left < 0:
            break
    timings = measure({"own": run, "best": _with(problem.kernel, run, best)}, sets, session.device, rounds=rounds)
    session.report.add(
        f"sweep {problem.kernel}", problem.name, "hf_paged", "speed-up", "x", ratios(timings["own"], timings["best"]),
        baseline="own tiles", model=problem.model, dtype=session.dtype_name, config=best,
        microseconds=timings["best"].median * 1e6,
    )  # fmt: skip
    print(f"    {best or 'the launcher is right'}", flush=True)


def _with(kernel: str, run: Callable[[int], torch.Tensor], values: dict[str, int]) -> Callable[[int], torch.Tensor]:
    def tuned_run(i: int) -> torch.Tensor:
        with tuning(kernel, **values):
            return run(i)

    return tuned_run


def _right(problem: Problem, run, values: dict[str, int], expected: torch.Tensor) -> bool:
    """Whether the configuration runs. Raises AssertionError if its result is another."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    try:
        got = _with(problem.kernel, run, values)(0)
    except (CompilationError, OutOfResources, RuntimeError):
        return False
    case = compare(str(values), got, expected, expected.dtype, BOUNDS[expected.dtype])
    assert case.used <= 1, f"{problem.kernel} {problem.name} with {values}: another result, off by {case.error:.2g}"
    return True
