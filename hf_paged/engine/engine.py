"""The engine: `add` requests, `step` them all forward together, read their outputs.

One step is: schedule a plan, run the model on it once, sample every row that is due, commit, tell the callers. A
request that cannot go on (a user's callable raised, logits are not numbers, the forward fails because of it) ends with
its own error; the others never notice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from ..base.config import EngineConfig
from ..base.errors import (
    DeadlineExceeded,
    EngineClosed,
    InvalidArgument,
    QueueFull,
    RequestFailed,
)
from ..base.sampling_params import SamplingParams
from ..base.types import RequestOutput
from ..core.plan import StepPlan
from ..core.request import Request, Sequence
from ..runtime.batch import SequenceHooks, StepContext
from ..runtime.packed import Owner
from ..runtime.runner import PagedModel
from ..runtime.sampler import SampleResult, derive_seed
from .build import build, build_runner, build_speculator
from .checks import check_options, checked_forward_hooks, checked_params, most_new_tokens
from .execute import Due, StepExecutor
from .held import HeldRows
from .isolation import Isolation
from .job import run_job
from .lock import FairLock
from .metrics import StepClock
from .prompts import prompt_tokens
from .request_state import NO_HOOKS, RequestState, RowHooks, new_request_id

HELD_WAIT = 0.001  # seconds
Prompt = str | list[int] | list[dict]


class BatchEngine:
    """Continuous batching over one model. All methods may be called from any thread; steps run one at a time.

    Args:
        model: the model, as `runtime.runner.PagedModel`.
        tokenizer: needed for text prompts, text outputs, stop strings and bad words; None for token ids only.
        config: see EngineConfig.
        draft_engine: with speculation "draft", the engine of the draft model. It is only used here, not closed.
    """

    def __init__(self, model: PagedModel, tokenizer, config: EngineConfig, draft_engine: BatchEngine | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.max_model_len = config.max_model_len or model.max_model_len
        if self.max_model_len > model.length_limit:
            raise InvalidArgument(f"max_model_len {self.max_model_len} is too long: {model.length_note}")
        self._lock = FairLock()
        self._states: dict[str, RequestState] = {}
        self._touched: dict[str, RequestState] = {}
        self._isolation = Isolation()
        self._count = 0
        self._stepping = False
        self._dropped: deque[list[Sequence]] = deque()  # held rows whose owner is gone
        self._abandoned: deque[RequestState] = deque()  # requests nobody waits for
        self.closed = False
        self._cache, self._scheduler = build(model, config, self.max_model_len)
        self._runner = build_runner(model, config, self._cache, self._scheduler)
        self._executor = StepExecutor(self._runner, self._scheduler)
        self._speculator = build_speculator(model, config, draft_engine)
        self.reset_stats()

    # Requests in

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str | None = None,
        logits_processors: Iterable[Callable] = (),
        stopping_criteria: Iterable[Callable] = (),
        forward_hooks: Mapping[str, Callable] | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> str:
        """Submit a request and return its id.

        Args:
            prompt: text, token ids, or chat messages ({"role", "content"}) for the tokenizer's chat template.
            params: how to sample; default SamplingParams().
            request_id: any string that is not in use; made up if None.
            priority: with policy "priority", lower numbers run first.
            deadline: seconds from now after which the request ends with DeadlineExceeded.
            cache_salt: requests share cached prefixes only with requests of the same salt.
            logits_processors: called as `f(token_ids, logits [V]) -> logits [V]` before sampling.
            stopping_criteria: called as `f(token_ids) -> bool` after every token; true stops the completion.
            forward_hooks: {module name: `f(activation [t, ...], positions [t]) -> replacement or None`}: called after
                that module with the rows of this request alone, a copy whose changes in place count as a replacement;
                of a tuple, its first tensor. The output embedding has only the rows whose logits are needed. Such a
                request shares no cached prefix with others, so its functions see every token. (Those of a request that
                was preempted are computed, and seen, again.)
            on_output: called with the RequestOutput after every step that changed it, in the stepping thread.

        Raises:
            InvalidArgument, RequestTooLarge: the request is wrong or could never run; the message names the argument.
            QueueFull: `max_queue` requests wait already.
            EngineClosed: the engine is closed.
        """
        hooks = NO_HOOKS
        processors, criteria = tuple(logits_processors), tuple(stopping_criteria)
        if processors or criteria or forward_hooks is not None:
            hooks = RowHooks(
                processors=processors,
                criteria=criteria,
                forward_hooks=checked_forward_hooks(forward_hooks, self.model.check_module),
            )
        state = self.submit(
            prompt,
            params,
            request_id=request_id,
            priority=priority,
            deadline=deadline,
            cache_salt=cache_salt,
            hooks=hooks,
            on_output=on_output,
        )
        return state.request.request_id

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str | None = None,
        hooks: RowHooks = NO_HOOKS,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> RequestState:
        """`add` for callers inside the library: takes RowHooks and returns the request's live state."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidArgument(f"params must be SamplingParams, got {type(params).__name__}")
        text, ids = prompt_tokens(prompt, self.tokenizer, self.model.vocab_size)
        check_options(deadline, priority, cache_salt, self.config.policy)
        bad_words = checked_params(params, self.tokenizer, self.model.vocab_size)
        now = time.monotonic()
        with self._lock:
            self._check_open()
            request_id = new_request_id() if request_id is None else request_id
            if not isinstance(request_id, str) or request_id in self._states:
                raise InvalidArgument(f"request_id {request_id!r} must be a string that is not in use")
            self._look_if_idle()
            request = Request(
                request_id=request_id,
                prompt_token_ids=ids,
                n=params.n,
                max_tokens=most_new_tokens(params, len(ids), self.max_model_len),
                min_tokens=params.min_tokens,
                stop_token_ids=frozenset(params.stop_token_ids or ()),
                eos_token_ids=frozenset() if params.ignore_eos else self.model.eos_token_ids,
                priority=priority,
                arrival=now,
                deadline=None if deadline is None else now + deadline,
                cache_salt=cache_salt,
                # a function on activations sees every token of its request, and what it changes is nobody else's
                read_prefix_cache=params.prompt_logprobs is None and not hooks.forward_hooks,
                write_prefix_cache=not hooks.forward_hooks,
                params=params,
            )
            self._count += 1
            state = RequestState(
                request,
                params,
                prompt=text,
                tokenizer=self.tokenizer,
                seed=derive_seed(self.config.seed, self._count) if params.seed is None else params.seed,
                bad_words_ids=bad_words,
                hooks=hooks,
                callback=on_output,
            )
            request.state = state
            self._scheduler.add(request)
            self._states[request_id] = state
        return state

    def submit_when_possible(self, prompt: Prompt, params: SamplingParams | None = None, **options) -> RequestState:
        """`submit`, stepping while the queue is full: for callers with more rows than `max_queue`."""
        while True:
            try:
                return self.submit(prompt, params, **options)
            except QueueFull:
                self.step()

    # One step

    def step(self) -> list[RequestOutput]:
        """Run one step and return the outputs it changed. They are live objects: later steps update them in place."""
        with self._lock:
            self._check_open()
            if self._stepping:
                raise InvalidArgument("step was called from inside a step (by a processor, criterion or hook)")
            self._stepping = True
            try:
                return self._step()
            finally:
                self._stepping = False

    def _step(self) -> list[RequestOutput]:
        started = time.perf_counter()
        self._release_dropped()
        self._expire()
        self._look_at_model()
        plan = self._schedule()
        mark = self._clock.lap("schedule", started)
        if plan is not None:
            if self._may_guess():
                plan = self._speculator.extend(plan, self._scheduler)
                self._clock.lap("draft", mark)
            self._run(plan)
        outputs = self._publish()
        self._clock.lap("total", started)
        return outputs

    def _look_at_model(self) -> None:
        """Before blocks are looked up: what the model has become decides which of them may be shared."""
        if self.model.weights_changed():
            self._scheduler.reset_prefix_cache()
        self._scheduler.share_prefixes(not self.model.hooked)

    def _look_if_idle(self) -> None:
        """When work starts: the slower look, which also finds writes behind autograd's back."""
        if not self._scheduler.has_unfinished() and self.model.weights_replaced():
            self._scheduler.reset_prefix_cache()

    def _may_guess(self) -> bool:
        """Not while a failing step is being bisected, nor while user code in the forward would see the guesses."""
        return self._speculator is not None and self._isolation.suspects() is None and not self.model.hooked

    def is_hooked(self) -> bool:
        """Whether somebody's forward hooks watch the model now, so that every row has to be computed."""
        with self._lock:
            self._look_at_model()
            return self.model.hooked

    def _schedule(self) -> StepPlan | None:
        plan = self._scheduler.schedule(only=self._isolation.suspects())
        while plan is None and self._isolation.suspects() is not None:
            self._isolation.cleared()  # the suspects are gone
            plan = self._scheduler.schedule(only=self._isolation.suspects())
        if plan is None and self._scheduler.has_unfinished():
            assert self._scheduler.held, "requests are left but none can run"
            time.sleep(HELD_WAIT)  # held rows have the blocks: let their owner get on
        return plan

    def _run(self, plan: StepPlan) -> None:
        hooks = self._sequence_hooks(plan)
        try:
            due, result = self._executor.execute(plan, hooks, self._clock)
        except Exception as error:
            self._scheduler.rollback(plan)
            if self._speculator is not None and self._speculator.bar(plan):
                return  # try again without guesses before anybody is blamed
            culprit = self._isolation.failed(plan.seq_ids)
            if culprit is not None:
                self._fail(culprit, error)
            return
        except BaseException:  # an interrupt: leave a state that another step can take up
            self._scheduler.rollback(plan)
            raise
        self._isolation.succeeded()
        for seq_id, error in hooks.errors.items():
            self._fail(seq_id, error)
        self._commit(plan, due, result)

    def _sequence_hooks(self, plan: StepPlan) -> SequenceHooks:
        states = ((seq_id, self._scheduler.sequence(seq_id).request.state) for seq_id in plan.seq_ids)
        return SequenceHooks({seq_id: state.hooks.forward_hooks for seq_id, state in states if state.hooks.forward_hooks})

    def _commit(self, plan: StepPlan, due: list[Due], result: SampleResult | None) -> None:
        mark = time.perf_counter()
        tokens: dict[int, list[int]] = {}
        failures: list[tuple[Sequence, Exception]] = []
        for one in due:
            taken, error = one.taken(result)
            if taken:
                tokens[one.sequence.seq_id] = taken
            if error is not None:
                failures.append((one.sequence, error))
            if self._speculator is not None:
                self._speculator.learn(one.sequence, len(one.drafts), max(len(taken) - 1, 0))
        committed = self._scheduler.commit(plan, tokens)
        self._clock.count(steps=1, tokens=plan.num_tokens)
        mark = self._clock.lap("schedule", mark)
        entries = {one.sequence.seq_id: [result.logprobs[index] for index in one.samples] for one in due}
        waiting = committed[::-1]
        try:
            while waiting:
                sequence = waiting.pop()
                self._advance(sequence, entries[sequence.seq_id])
        except BaseException as error:  # an interrupt: nobody may go on with a token that was not recorded
            for unrecorded in [sequence, *waiting, *(sequence for sequence, _ in failures)]:
                self._fail(unrecorded.seq_id, error)
            self._publish()
            raise
        for sequence, error in failures:
            if sequence.finish_reason is None:
                self._fail(sequence.seq_id, error)
        self._clock.lap("detokenize", mark)

    def _advance(self, sequence: Sequence, logprobs: list) -> None:
        """One completion got tokens: text, stop strings, the user's criteria, one token after the other."""
        state: RequestState = sequence.request.state
        if state.finished:  # another completion of the request failed just now
            return
        self._touch(state)
        done, last = len(state.sequence_state(sequence).output.token_ids), sequence.num_output
        for count, entry in zip(range(done + 1, last + 1), logprobs):
            end = sequence.num_prompt + count
            token = sequence.token_ids[end - 1]
            self._clock.count(output_tokens=1)
            try:
                stop_string = state.record_token(sequence, token, entry)
                if state.hooks.on_token is not None:
                    state.hooks.on_token(token)
                stopped = any([criterion(sequence.token_ids[:end]) for criterion in state.hooks.criteria])
            except Exception as error:
                return self._fail(sequence.seq_id, error)
            if (stop_string is not None or stopped) and (sequence.finish_reason is None or count < last):
                self._scheduler.cut(sequence.seq_id, count, "stop", stop_string)
                break
        if sequence.finish_reason is not None:
            state.finish_sequence(sequence)

    # Rows driven from outside

    def hold(self, num_rows: int, **options) -> HeldRows:
        """Rows on this engine's pages whose tokens somebody else decides; see `engine.held.HeldRows`."""
        return HeldRows(self, num_rows, **options)

    def _begin_held(self) -> None:
        """Before a held batch is planned: what `step` does before it schedules."""
        self._check_open()
        if self._stepping:
            raise InvalidArgument("a model call came from inside a step (from a processor, criterion or hook)")
        self._release_dropped()
        self._look_at_model()

    def _execute_held(
        self, plan: StepPlan, execute: Callable[[StepContext], object], owner: Callable[[int], Owner]
    ):
        """Build the batch of a held plan and run `execute` on it as this engine's step."""
        started = time.perf_counter()
        self._stepping = True
        try:
            context = self._runner.prepare(plan, owner)
            mark = self._clock.lap("build", started)
            result = self._runner.run(context, execute)
            self._clock.lap("model", mark)
        finally:
            self._stepping = False
        self._clock.count(steps=1, tokens=plan.num_tokens)
        self._clock.lap("total", started)
        return result

    def _release_dropped(self) -> None:
        while self._dropped:
            for sequence in self._dropped.popleft():
                self._scheduler.held.release(sequence)
        while self._abandoned:
            self._end(self._abandoned.popleft(), "abort")

    # Ends

    def _fail(self, seq_id: int, error: BaseException) -> None:
        """End the whole request of a sequence with an error of its own."""
        self._end_with(self._scheduler.sequence(seq_id).request.state, error)

    def _end_with(self, state: RequestState, error: BaseException) -> None:
        """End a request with an error, as a RequestFailed whose cause it is."""
        request_id = state.request.request_id
        if not (isinstance(error, RequestFailed) and error.request_id == request_id):
            cause = error
            error = RequestFailed(request_id, f"{type(cause).__name__}: {cause}")
            error.__cause__ = cause
        self._end(state, "error", error)

    def _end(self, state: RequestState, reason: str, error: Exception | None = None) -> None:
        if state.finished:
            return
        self._scheduler.abort(state.request.request_id)
        state.end(reason, error)
        self._touch(state)

    def _expire(self) -> None:
        now = time.monotonic()
        for request in self._scheduler.expired(now):
            self._end(
                request.state,
                "error",
                DeadlineExceeded(request.request_id, f"not finished {request.deadline - request.arrival:g} s after it came"),
            )

    def abort(self, request_id: str) -> bool:
        """End a request now, wherever it is, and free what it held. False if there is no such unfinished request."""
        with self._lock:
            state = self._states.get(request_id)
            if state is None or state.finished:
                return False
            self._end(state, "abort")
            self._publish()
            return True

    def fail_all(self, error: BaseException) -> None:
        """End every unfinished request with `error`: the engine itself could not go on."""
        with self._lock:
            for state in list(self._states.values()):
                self._end_with(state, error)
            self._publish()

    def release(self, state: RequestState) -> None:
        """Abort a submitted request if it still runs; for callers of `submit`."""
        self.abort(state.request.request_id)

    def abandon(self, state: RequestState) -> None:
        """`release` for finalizers, which may run in the middle of a step: done when the next step begins."""
        self._abandoned.append(state)

    def _touch(self, state: RequestState) -> None:
        self._touched[state.request.request_id] = state

    def _publish(self) -> list[RequestOutput]:
        """Close what finished, tell the callbacks, return the outputs that changed."""
        touched, self._touched = self._touched, {}
        for request_id, state in touched.items():
            state.settle()
            if state.finished:
                self._states.pop(request_id, None)
                self._executor.forget(state)
                self._forget_guesses(state)
        for state in touched.values():
            if state.callback is not None:
                state.notify()
        return [state.output for state in touched.values()]

    def _forget_guesses(self, state: RequestState) -> None:
        if self._speculator is not None:
            for sequence in state.request.sequences:
                self._speculator.forget(sequence.seq_id)

    def generate(
        self, prompts, params: SamplingParams | list[SamplingParams] | None = None, *, progress: bool = False
    ) -> list[RequestOutput]:
        """Run prompts to their end and return their outputs in order.

        Args:
            prompts: one prompt or a list of them, each as in `add`.
            params: for all prompts, or a list with one per prompt.
            progress: show a tqdm bar.

        Raises:
            RequestFailed: a prompt's own error. The other prompts are run to their end first; the exception's `outputs`
                lists all of them in order.
        """
        return run_job(self, prompts, params, progress)

    @property
    def has_state(self) -> bool:
        """Whether the model keeps a recurrent state per sequence: it can be forked, but not taken back by some tokens."""
        return self._scheduler.has_state

    def has_unfinished(self) -> bool:
        return self._scheduler.has_unfinished()

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; for weights changed in ways the engine cannot see."""
        with self._lock:
            self._scheduler.reset_prefix_cache()

    # Life and numbers

    def stats(self) -> dict:
        """Counts since the last `reset_stats`, and memory in bytes now.

        `kv_bytes_in_use` and `kv_bytes_peak` count blocks that running requests hold; `kv_bytes_allocated` is what the
        cache takes from the machine; the `state_bytes` of layers that keep a state likewise. `draft_tokens` were guessed,
        `accepted_tokens` of them were right and `acceptance_rate` is their share (None if nothing was guessed). Times are
        in seconds; `time_model` is the forward, `time_draft` what guessing took, the rest is the engine's own
        (`time_build` packs the batch, and grows the cache when it must).
        """
        with self._lock:
            scheduler = self._scheduler.stats()
            size, slot_size = self._cache.bytes_per_block, self._cache.states.bytes_per_slot
            in_use, peak = scheduler.pop("blocks_in_use"), scheduler.pop("blocks_peak")
            drafted, accepted = scheduler["draft_tokens"], scheduler["accepted_tokens"]
            return {
                **scheduler,
                "acceptance_rate": accepted / drafted if drafted else None,
                **self._clock.stats(),
                "kv_bytes_allocated": self._cache.bytes_allocated,
                "kv_bytes_in_use": sum(size(i) * count for i, count in enumerate(in_use)),
                "kv_bytes_peak": sum(size(i) * count for i, count in enumerate(peak)),
                "state_bytes_allocated": self._cache.states.bytes_allocated,
                "state_bytes_in_use": slot_size * scheduler["slots_in_use"],
                "state_bytes_peak": slot_size * scheduler["slots_peak"],
            }

    def reset_stats(self) -> None:
        with self._lock:
            self._clock = StepClock()
            self._scheduler.reset_stats()

    def check_integrity(self) -> None:
        """Assert that every block is accounted for."""
        with self._lock:
            self._scheduler.check_integrity()

    def close(self) -> None:
        """End what still runs, free the KV cache. Closing twice is fine."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            for state in list(self._states.values()):
                self._end(state, "error", EngineClosed(f"the engine was closed before {state.request.request_id} ended"))
            self._publish()
            for sequence in list(self._scheduler.held):
                self._scheduler.held.release(sequence)
            self._runner.close()
            if self._speculator is not None:
                self._speculator.close()

    def _check_open(self) -> None:
        if self.closed:
            raise EngineClosed("the engine is closed")

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()
