"""For tests of overlapping steps: an engine's executor that keeps a record, and fails when it is told to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hf_paged.engine.execute import InFlight


class Recorder:
    """Stands in for an engine's StepExecutor.

    Args:
        fails_at_once, fails_late: called with the tokens so far of a plan's sequences by id, unknown ones missing,
            before its step is launched; true makes it fail then, or when its result is asked for.

    Attributes:
        events: ("launch" or "read", number of the step), in order.
    """

    def __init__(self, engine, fails_at_once: Callable | None = None, fails_late: Callable | None = None):
        self.events: list[tuple[str, int]] = []
        self._executor = engine._stepper._executor
        self.may_run_on = self._executor.may_run_on
        self._scheduler = engine._scheduler
        self._fails_at_once = fails_at_once or (lambda tokens: False)
        self._fails_late = fails_late or (lambda tokens: False)
        engine._stepper._executor = self

    def launch(self, plan, hooks, previous, clock) -> InFlight:
        tokens = {seq_id: list(self._scheduler.sequence(seq_id).token_ids) for seq_id in plan.seq_ids}
        if self._fails_at_once(tokens):
            raise RuntimeError("failed at once")
        self.events.append(("launch", plan.step))
        flight = self._executor.launch(plan, hooks, previous, clock)
        copied = {field.name: getattr(flight, field.name) for field in dataclasses.fields(flight)}
        return _Recorded(**copied, recorder=self, failed=self._fails_late(tokens))

    def steps_ahead(self) -> list[int]:
        """At every read, how many steps had been launched after the one that is read."""
        launched, found = 0, []
        for place, (kind, step) in enumerate(self.events):
            launched += kind == "launch"
            if kind == "read":
                found.append(sum(event == "launch" and other > step for event, other in self.events[:place]))
        return found


@dataclasses.dataclass(slots=True, eq=False)
class _Recorded(InFlight):
    recorder: Recorder
    failed: bool

    def result(self, clock):
        self.recorder.events.append(("read", self.plan.step))
        if self.failed:
            raise RuntimeError("failed late")
        return InFlight.result(self, clock)
