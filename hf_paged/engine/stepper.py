"""The engine's steps: launch one, collect the one before it.

    sync      schedule | launch 1 | wait | commit 1 | schedule | launch 2 | wait | commit 2 | ...
    overlap   launch 1 | schedule | launch 2 | wait for 1 | commit 1 | schedule | launch 3 | wait for 2 | ...

With overlap the device always has a step to do while the host schedules and commits; `core.under_way` says how a step
is planned on tokens that are still on the device. Steps run in the order of their plans.

A step is collected at once, before anything else is planned, if somebody must see its outcome first: a request's own
processors, hooks, penalties or torch's generator (`StepExecutor.may_run_on`), a forward hook on the model, guesses, or the
search for the request that makes a step fail. So is the last one when there is nothing left to launch.
"""

from __future__ import annotations

import time
from collections import deque

from ..base.errors import ParallelError
from ..core.plan import StepPlan
from ..core.request import Sequence
from ..core.scheduler import Scheduler
from ..runtime.batch import SequenceHooks
from ..runtime.media import EncoderOutputs, EncodingFailed
from ..runtime.runner import PagedModel
from ..runtime.sampler import SampleResult
from .execute import InFlight, StepExecutor
from .isolation import Isolation
from .jump import JumpAhead
from .metrics import StepClock
from .offload import HostOffload
from .open_requests import OpenRequests
from .request_state import RequestState
from .speculation import Speculator

WAIT = 0.001  # seconds


class Stepper:
    """Takes the requests of one engine forward.

    Args:
        overlap: let a step run while the next one is scheduled.
        encoder: what is kept of images; None for a model that takes none.
        offload: the host's memory behind the cache; None: there is none.

    Attributes:
        clock: where the time went.
        num_forgotten: counts the times that all that was computed became of no use, as the model had changed.
    """

    def __init__(
        self,
        model: PagedModel,
        executor: StepExecutor,
        scheduler: Scheduler,
        requests: OpenRequests,
        speculator: Speculator | None,
        jump: JumpAhead,
        *,
        overlap: bool,
        encoder: EncoderOutputs | None = None,
        offload: HostOffload | None = None,
    ):
        self._model = model
        self._executor = executor
        self._scheduler = scheduler
        self._requests = requests
        self._speculator = speculator
        self._jump = jump
        self._overlap = overlap and speculator is None  # guesses follow known tokens
        self._encoder = encoder
        self._offload = offload
        self._isolation = Isolation()
        self._in_flight: deque[InFlight] = deque()  # oldest first; at most one between steps
        self._model_moves = False  # it has changed since a step was last collected
        self.clock = StepClock()
        self.num_forgotten = 0

    def step(self) -> None:
        """Launch the next step and collect the one before it, or whatever must be collected."""
        try:
            self._step()
        except BaseException:  # an interrupt, wherever it came: leave a state that another step can take up
            self.take_back()
            raise

    def _step(self) -> None:
        mark = time.perf_counter()
        self._requests.expire()
        self.look_at_model()
        plan = self._schedule()
        mark = self.clock.lap("schedule", mark)
        looks_ahead = self._speculator is not None or self._jump.wanted
        if plan is not None and looks_ahead and self._may_look_ahead():
            plan = self._jump.extend(plan, self._scheduler)
            if self._speculator is not None:
                plan = self._speculator.extend(plan, self._scheduler)
            self.clock.lap("draft", mark)
        ahead = plan is not None and self._launch(plan) and self._may_run_on()
        self._collect(all_but=int(ahead))
        if not self._scheduler.has_unfinished():
            self.take_back()  # rows of completions that have ended: nobody asks for them

    def look_at_model(self) -> None:
        """Before blocks are looked up: what the model has become decides which of them may be shared.

        A step still in flight was computed by what the model was before. The next token is to come from what it is now.
        """
        if self._model.weights_changed():
            self._model_moves = True
            self.take_back()
            self.forget_computed()
        if self._offload is not None:
            self._offload.look()
        self._scheduler.share_prefixes(not self._model.hooked)

    def forget_computed(self) -> None:
        """No later request may find what the model has computed so far: it has changed."""
        self.num_forgotten += 1
        self._scheduler.reset_prefix_cache()
        if self._offload is not None:
            self._offload.forget()
        if self._encoder is not None:
            self._encoder.clear()

    def take_back(self) -> None:
        """Forget what is in flight. Its sequences compute it again, if they have not ended."""
        self._in_flight.clear()
        self._scheduler.take_back()

    def drain(self) -> None:
        """Collect what is in flight, so that the next step starts from what is known.

        Unless the model has changed since: see `look_at_model`.
        """
        self.look_at_model()
        self._collect()

    # Launch

    def _schedule(self) -> StepPlan | None:
        plan = self._scheduler.schedule(only=self._isolation.suspects())
        while plan is None and self._isolation.suspects() is not None:
            self._isolation.cleared()  # the suspects are gone
            plan = self._scheduler.schedule(only=self._isolation.suspects())
        if plan is None and not self._in_flight and self._scheduler.has_unfinished():
            assert self._scheduler.held or self._scheduler.reads_disk, "requests are left but none can run"
            time.sleep(WAIT)  # held rows have the blocks: let their owner get on; or a disk does
        return plan

    def _may_look_ahead(self) -> bool:
        """Not while a failing step is being bisected, nor while user code in the forward would see tokens that may not come.

        What is looked ahead from must be known.
        """
        return self._isolation.suspects() is None and not self._model.hooked and not self._in_flight

    def _launch(self, plan: StepPlan) -> bool:
        """False if it failed."""
        states = ((seq_id, self._scheduler.sequence(seq_id).request.state) for seq_id in plan.seq_ids)
        hooks = SequenceHooks(
            {seq_id: state.hooks.forward_hooks for seq_id, state in states if state.hooks.forward_hooks}
        )
        try:
            previous = self._in_flight[0].samples if self._in_flight else None
            flight = self._executor.launch(plan, hooks, previous, self.clock)
        except ParallelError:  # nobody's request is to blame
            self._scheduler.rollback(plan)
            raise
        except EncodingFailed as error:
            self._scheduler.rollback(plan)
            for seq_id in {rows.seq_id for rows in plan.media if rows.key == error.key}:
                self._requests.fail(self._scheduler.sequence(seq_id), error.__cause__)
            return False
        except Exception as error:
            self._scheduler.rollback(plan)
            if self._collect():  # else the step before it failed, too, and is the more likely cause
                self._blame(plan, error)
            return False
        self._scheduler.launched(plan)
        self._in_flight.append(flight)
        return True

    def _may_run_on(self) -> bool:
        """Whether the step just launched may be collected after the next one is launched.

        Not while the model changes: if it does so in every forward, every step would be taken back.
        """
        if not self._overlap or self._model.hooked or self._model_moves or self._isolation.suspects() is not None:
            return False
        return self._executor.may_run_on(self._in_flight[-1])

    # Collect

    def _collect(self, all_but: int = 0) -> bool:
        """Read and commit the steps in flight but for the newest `all_but`. False if one had failed."""
        while len(self._in_flight) > all_but:
            flight = self._in_flight[0]
            try:
                result = flight.result(self.clock)
            except Exception as error:
                self.take_back()  # what was launched since went on from it
                self._blame(flight.plan, error)
                return False
            self._isolation.succeeded()
            self._model_moves = False
            for seq_id, error in flight.hooks.errors.items():
                self._requests.fail(self._scheduler.sequence(seq_id), error)
            self._commit(flight, result)
        return True

    def _blame(self, plan: StepPlan, error: Exception) -> None:
        """The step of `plan` failed and was taken back: end the request that is to blame, or go on to find it."""
        barred = self._jump.bar(plan)
        if self._speculator is not None and self._speculator.bar(plan) or barred:
            return  # try again without guesses before anybody is blamed
        culprit = self._isolation.failed(plan.seq_ids)
        sequence = None if culprit is None else self._scheduler.unfinished(culprit)
        if sequence is not None:
            self._requests.fail(sequence, error)

    def _commit(self, flight: InFlight, result: SampleResult | None) -> None:
        mark = time.perf_counter()
        tokens: dict[int, list[int]] = {}
        failures: list[tuple[Sequence, Exception]] = []
        for one in flight.due:
            taken, error = one.taken(result)
            if taken:
                tokens[one.sequence.seq_id] = taken
            if error is not None:
                failures.append((one.sequence, error))
            if self._speculator is not None and one.sequence.seq_id not in self._jump.jumping:
                self._speculator.learn(one.sequence, len(one.drafts), max(len(taken) - 1, 0))
        self._in_flight.popleft()
        committed = self._scheduler.commit(flight.plan, tokens)
        self.clock.count(steps=1, tokens=flight.plan.num_tokens)
        mark = self.clock.lap("schedule", mark)
        entries = {one.sequence.seq_id: [result.logprobs[index] for index in one.samples] for one in flight.due}
        waiting = committed[::-1]
        try:
            while waiting:
                sequence = waiting.pop()
                self._advance(sequence, entries.get(sequence.seq_id, []))
        except BaseException as error:  # an interrupt: nobody may go on with a token that was not recorded
            for unrecorded in [sequence, *waiting, *(sequence for sequence, _ in failures)]:
                self._requests.fail(unrecorded, error)
            raise
        for sequence, error in failures:
            if sequence.finish_reason is None:
                self._requests.fail(sequence, error)
        self.clock.lap("detokenize", mark)

    def _advance(self, sequence: Sequence, logprobs: list) -> None:
        """One completion got tokens, or wanted none: text, stop strings, the user's criteria, one token after the other."""
        state: RequestState = sequence.request.state
        if state.finished:  # another completion of the request failed just now
            return
        self._requests.touch(state)
        done, last = len(state.sequence_state(sequence).output.token_ids), sequence.num_output
        for count, entry in zip(range(done + 1, last + 1), logprobs):
            end = sequence.num_prompt + count
            token = sequence.token_ids[end - 1]
            self.clock.count(output_tokens=1)
            try:
                stop_string = state.record_token(sequence, token, entry)
                if state.hooks.on_token is not None:
                    state.hooks.on_token(token)
                stopped = any([criterion(sequence.token_ids[:end]) for criterion in state.hooks.criteria])
            except Exception as error:
                return self._requests.fail(sequence, error)
            if (stop_string is not None or stopped) and (sequence.finish_reason is None or count < last):
                self._scheduler.cut(sequence.seq_id, count, "stop", stop_string)
                break
        if sequence.finish_reason is not None:
            try:
                state.finish_sequence(sequence)
            except Exception as error:  # a task's numbers are none
                self._requests.fail(sequence, error)
