"""Where the time of a step goes, and how much came of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .trace import StepTrace

PHASES = ("total", "schedule", "draft", "build", "encode", "model", "sample", "detokenize")
COUNTERS = ("steps", "tokens", "output_tokens")


class StepClock:
    """Seconds of the host per phase of a step, and counts of steps and tokens, since the last `reset`.

    total       a call of `step`, or of the model on rows driven from outside
    schedule    planning, and taking up what was sampled
    draft       guessing tokens
    build       packing the batch and sending it to the device
    encode      the encoder's forwards on images; on CUDA: starting them
    model       the forward; on CUDA: starting it, and waiting for the device later, sampling included
    sample      sampling (on CUDA: starting it), and reading the results
    detokenize  text, stop strings, criteria

    A step that is scheduled while another one runs shortens `model`, and nothing else.

    Attributes:
        trace: is told of every phase, too; None: nobody is.
    """

    def __init__(self):
        self.trace: StepTrace | None = None
        self.reset()

    def reset(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._counts = dict.fromkeys(COUNTERS, 0)

    def lap(self, phase: str, since: float) -> float:
        """Add the time since `since` (a `time.perf_counter()`) to a phase; returns the time now."""
        now = time.perf_counter()
        self._seconds[phase] += now - since
        if self.trace is not None:
            self.trace.span(phase, since, now)
        return now

    def count(self, **amounts: int) -> None:
        for name, amount in amounts.items():
            self._counts[name] += amount

    @property
    def num_tokens(self) -> int:
        """Tokens computed so far."""
        return self._counts["tokens"]

    def stats(self) -> dict:
        return {**self._counts, **{f"time_{phase}": seconds for phase, seconds in self._seconds.items()}}
