"""The engine: `add` requests, `step` them all forward together, read their outputs.

One step is: schedule a plan, run the model on it once, sample every row that is due, commit, tell the callers;
`stepper` says in which order. A request that cannot go on (a user's callable raised, logits are not numbers, the forward
fails because of it) ends with its own error; the others never notice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as AbstractSequence
from contextlib import contextmanager

from ..base.branch import Branch
from ..base.config import EngineConfig
from ..base.errors import EngineClosed, InvalidArgument, ParallelError, QueueFull
from ..base.sampling_params import SamplingParams
from ..base.types import RequestOutput
from ..core.plan import StepPlan
from ..core.request import Sequence
from ..parallel.encoding import encode_config
from ..parallel.team import Order
from ..runtime.batch import StepContext
from ..runtime.leading import LeadingRunner
from ..runtime.media import Media
from ..runtime.packed import Owner
from ..runtime.runner import ModelRunner, PagedModel
from ..runtime.sampler import derive_seed
from .branching import Branching
from .build import build, build_encoder, build_runner, build_speculator, check_config
from .execute import StepExecutor
from .held import HeldRows
from .intake import Intake
from .job import Jobs
from .jump import JumpAhead
from .kv_states import KVStates
from .lock import FairLock
from .memory import CacheMemory
from .offload import HostOffload
from .open_requests import OpenRequests
from .request_state import RequestState, RowHooks
from .stepper import Stepper
from .tasks import TaskParams
from .upkeep import Upkeep

Prompt = str | list[int] | list[dict] | Branch


class BatchEngine(Jobs, Branching, KVStates, Upkeep):
    """Continuous batching over one model. All methods may be called from any thread; steps run one at a time.

    Args:
        model: the model, as `runtime.runner.PagedModel`.
        tokenizer: needed for text prompts, text outputs, stop strings and bad words; None for token ids only. A processor,
            which has a tokenizer, for text prompts with images.
        config: see EngineConfig.
        draft_engine: with speculation "draft", the engine of the draft model. It is only used here, not closed.
    """

    def __init__(self, model: PagedModel, tokenizer, config: EngineConfig, draft_engine: BatchEngine | None = None):
        self.model = model
        self.processor = tokenizer if hasattr(tokenizer, "image_processor") else None
        self.tokenizer = tokenizer if self.processor is None else tokenizer.tokenizer
        self.config = config
        self.max_model_len = config.max_model_len or model.max_model_len
        if self.max_model_len > model.length_limit:
            raise InvalidArgument(f"max_model_len {self.max_model_len} is too long: {model.length_note}")
        self._lock = FairLock()
        self._count = 0
        self._stepping = False
        self._dropped: deque[list[Sequence]] = deque()  # held rows whose owner is gone
        self._abandoned: deque[RequestState] = deque()  # requests nobody waits for
        self._pinned: dict[str, Sequence] = {}  # by what `load_kv` called it
        self._digest: tuple[int, str] | None = None  # of the model, as of how often it had changed
        self.closed = False
        self._encoder = build_encoder(model, config)
        self._offload = None if config.offload is None else HostOffload(config.offload)
        if model.team is None:
            self._cache, self._scheduler = build(model, config, self.max_model_len, self._encoder, self._offload)
        else:
            check_config(model, config)
            with model.team.talking, model.team.together("open"):
                model.team.send(Order.OPEN, encode_config(config, self.max_model_len))
                self._cache, self._scheduler = build(model, config, self.max_model_len, self._encoder)
        kind = ModelRunner if model.team is None else LeadingRunner
        self._runner = build_runner(model, config, self._cache, self._scheduler, kind)
        self._memory = CacheMemory(self._runner, self._scheduler)
        self._speculator = build_speculator(model, config, draft_engine)
        self._jump = JumpAhead()
        self._requests = OpenRequests(self._scheduler, self._forget)
        self._intake = Intake(model, self.tokenizer, self.processor, config, self.max_model_len)
        self._executor = StepExecutor(self._runner, self._scheduler, self._encoder)
        self._stepper = Stepper(
            model,
            self._executor,
            self._scheduler,
            self._requests,
            self._speculator,
            self._jump,
            overlap=model.device.type == "cuda" if config.overlap is None else config.overlap,
            encoder=self._encoder,
            offload=self._offload,
        )
        self.reset_stats()

    # Requests in

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | TaskParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        user: str | None = None,
        deadline: float | None = None,
        cache_salt: str | None = None,
        adapter: str | None = None,
        logits_processors: Iterable[Callable] = (),
        stopping_criteria: Iterable[Callable] = (),
        forward_hooks: Mapping[str, Callable] | None = None,
        images: AbstractSequence | Mapping | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> str:
        """Submit a request and return its id.

        Args:
            prompt: text, token ids, or chat messages ({"role", "content"}) for the tokenizer's chat template; to classify
                also a tuple of two texts. Or what `fork` gave: the output then goes on from there.
            params: how to sample, default SamplingParams(); or EmbedParams, ScoreParams or ClassifyParams for a request that
                is to bring a `result` and no tokens.
            request_id: any string that is not in use; made up if None.
            priority: with policy "priority", lower numbers run first.
            user: with policy "fair", whose share it is served from. Requests without one are one user's together.
            deadline: seconds from now after which the request ends with DeadlineExceeded.
            cache_salt: requests share cached prefixes only with requests of the same salt.
            adapter: the name of a loaded adapter; None: the model as it is.
            logits_processors: called as `f(token_ids, logits [V]) -> logits [V]` before sampling.
            stopping_criteria: called as `f(token_ids) -> bool` after every token; true stops the completion.
            forward_hooks: {module name: `f(activation [t, ...], positions [t]) -> replacement or None`}: called after
                that module with the rows of this request alone, a copy whose changes in place count as a replacement;
                of a tuple, its first tensor. The output embedding has only the rows whose logits are needed. Such a
                request shares no cached prefix with others, so its functions see every token. (Those of a request that
                was preempted are computed, and seen, again.)
            images: those of the prompt, in the order of its placeholders: PIL images, arrays [H, W, C] or encoded bytes
                (PNG, JPEG, ...) beside text, or beside messages with parts {"type": "image"}; beside token ids, what the
                processor made of them (a mapping with `pixel_values` and the like). `EngineConfig.images` limits them.
            on_output: called with the RequestOutput after every step that changed it, in the stepping thread.

        Raises:
            InvalidArgument, RequestTooLarge: the request is wrong or could never run; the message names the argument. So it
                is with an image that cannot be decoded, or exceeds a limit.
            UnsupportedOption: the model has no head for it, or takes no images.
            QueueFull: `max_queue` requests wait already, or images of requests take `ImageLimits.queue_memory`.
            EngineClosed: the engine is closed.
        """
        state = self.submit(
            prompt,
            params,
            request_id=request_id,
            priority=priority,
            user=user,
            deadline=deadline,
            cache_salt=cache_salt,
            adapter=adapter,
            hooks=self.hooks(logits_processors, stopping_criteria, forward_hooks),
            images=images,
            on_output=on_output,
        )
        return state.request.request_id

    def submit(self, prompt: Prompt, params: SamplingParams | TaskParams | None = None, **options) -> RequestState:
        """`add` for callers inside the library: takes RowHooks as `hooks`, and returns the request's live state."""
        state = self.prepare(prompt, params, **options)
        self.admit(state)
        return state

    def hooks(
        self,
        logits_processors: Iterable[Callable] = (),
        stopping_criteria: Iterable[Callable] = (),
        forward_hooks: Mapping[str, Callable] | None = None,
    ) -> RowHooks:
        """A caller's functions, as `prepare` takes them."""
        return self._intake.hooks(logits_processors, stopping_criteria, forward_hooks)

    def prepare(self, prompt: Prompt, params: SamplingParams | TaskParams | None = None, **options) -> RequestState:
        """The first half of `submit`, which waits for nobody: tokens, checks, grammars."""
        return self._intake.request(prompt, params, **options)

    def read_images(self, text: str, images: AbstractSequence, *, add_special_tokens: bool = True) -> tuple[list[int], Media]:
        """Token ids, and what `prepare` takes as `media`, of a text with placeholders for images: `add`'s first part.

        For callers that render chat templates themselves. Errors are those of `add`.
        """
        return self._intake.images.of_text(text, images, add_special_tokens=add_special_tokens)

    def admit(self, *states: RequestState) -> None:
        """The second half of `submit`, for requests that are all taken or none.

        Raises QueueFull or EngineClosed, or InvalidArgument for an id that is in use.
        """
        with self._lock:
            self._check_open()
            self._scheduler.check_room(len(states))
            self._requests.check_room(states, self.config.images.queue_memory)
            taken = []
            try:
                for state in states:
                    self._admit(state)
                    taken.append(state)
            except Exception:
                for state in taken:
                    self._requests.end(state, "abort")
                raise

    def _admit(self, state: RequestState) -> None:
        request = state.request
        if request.request_id in self._requests:
            raise InvalidArgument(f"request_id {request.request_id!r} must be one that is not in use")
        if not self.model.adapters.is_loaded(request.adapter):
            raise InvalidArgument("adapter was unloaded before the request was added")
        self._look_if_idle()
        self._count += 1
        if state.seed is None:
            state.seed = derive_seed(self.config.seed, self._count)
        self._scheduler.add(request)
        self._requests.add(state)
        if request.begun:
            state.sequence_state(request.sequences[0])  # its output shows them from the start
        self._jump.admitted(state)

    def submit_when_possible(
        self, prompt: Prompt, params: SamplingParams | TaskParams | None = None, **options
    ) -> RequestState:
        """`submit`, stepping while the queue is full: for callers with more rows than `max_queue`."""
        while True:
            try:
                return self.submit(prompt, params, **options)
            except QueueFull:
                self.step()

    # One step

    def step(self) -> list[RequestOutput]:
        """Run one step and return the outputs it changed. They are live objects: later steps update them in place.

        With `overlap` a call starts the next step and returns what the one before it changed: nothing the first time.
        """
        with self._lock:
            self._check_open()
            if self._stepping:
                raise InvalidArgument("step was called from inside a step (by a processor, criterion or hook)")
            self._stepping = True
            started = time.perf_counter()
            computed = self._stepper.clock.num_tokens
            try:
                self._memory.wake()
                self._release_dropped()
                self._stepper.step()
            except ParallelError as error:
                self._end_all(error)
                raise
            except BaseException:
                self._requests.publish()
                raise
            finally:
                self._stepping = False
            outputs = self._requests.publish()
            ended = self._stepper.clock.lap("total", started)
            if self._offload is not None:
                taken = self._stepper.clock.num_tokens - computed
                self._offload.computed(taken, ended - started, self._scheduler.num_running)
            if self._stepper.clock.trace is not None:
                self._trace_amounts()
            return outputs

    def _look_if_idle(self) -> None:
        """When work starts: the slower look, which also finds writes behind autograd's back."""
        if not self._scheduler.has_unfinished() and self.model.weights_replaced():
            self._stepper.forget_computed()

    def is_hooked(self) -> bool:
        """Whether somebody's forward hooks watch the model now, so that every row has to be computed."""
        with self._lock:
            if not self._stepping:
                self._stepper.look_at_model()
            return bool(self.model.hooked)

    @contextmanager
    def between_steps(self):
        """Scope in which no step runs and the model is as it is now: for forwards beside the engine's."""
        with self._lock:
            self._check_open()
            if self._stepping:
                raise InvalidArgument("a model call came from inside a step (from a processor, criterion or hook)")
            self._stepper.look_at_model()
            yield

    # Rows driven from outside

    def hold(self, num_rows: int, **options) -> HeldRows:
        """Rows on this engine's pages whose tokens somebody else decides; see `engine.held.HeldRows`."""
        return HeldRows(self, num_rows, **options)

    def _begin_held(self) -> None:
        """Before a held batch is planned: what `step` does before it schedules."""
        self._check_open()
        if self._stepping:
            raise InvalidArgument("a model call came from inside a step (from a processor, criterion or hook)")
        self._memory.wake()
        self._release_dropped()
        self._stepper.look_at_model()

    def _execute_held(
        self, plan: StepPlan, execute: Callable[[StepContext], object], owner: Callable[[int], Owner]
    ):
        """Build the batch of a held plan and run `execute` on it as this engine's step."""
        clock, started = self._stepper.clock, time.perf_counter()
        self._stepping = True
        try:
            context = self._runner.prepare(plan, owner)
            mark = clock.lap("build", started)
            result = self._runner.run(context, execute)
            clock.lap("model", mark)
        finally:
            self._stepping = False
        clock.count(steps=1, tokens=plan.num_tokens)
        clock.lap("total", started)
        return result

    def _release_dropped(self) -> None:
        while self._dropped:
            for sequence in self._dropped.popleft():
                self._scheduler.held.release(sequence)
        while self._abandoned:
            self._requests.end(self._abandoned.popleft(), "abort")

    # Ends

    def abort(self, request_id: str) -> bool:
        """End a request now, wherever it is, and free what it held. False if there is no such unfinished request."""
        with self._lock:
            state = self._requests.get(request_id)
            if state is None or state.finished:
                return False
            self._requests.end(state, "abort")
            self._settle()
            return True

    def fail_all(self, error: BaseException) -> None:
        """End every unfinished request with `error`: the engine itself could not go on."""
        with self._lock:
            self._end_all(error)

    def _end_all(self, error: BaseException) -> None:
        for state in self._requests:
            self._requests.end_with(state, error)
        self._settle()

    def _settle(self) -> None:
        """Requests were ended, perhaps between steps: keep no step in flight that is nobody's, tell who waits."""
        if not self._stepping and not self._scheduler.has_unfinished():
            self._stepper.take_back()
        self._requests.publish()

    def release(self, state: RequestState) -> None:
        """Abort a submitted request if it still runs; for callers of `submit`."""
        self.abort(state.request.request_id)

    def abandon(self, state: RequestState) -> None:
        """`release` for finalizers, which may run in the middle of a step: done when the next step begins."""
        self._abandoned.append(state)

    def _forget(self, state: RequestState) -> None:
        """The request has ended."""
        self._executor.forget(state)
        self._jump.forget(state)
        if self._speculator is not None:
            for sequence in state.request.sequences:
                self._speculator.forget(sequence.seq_id)

    @property
    def has_state(self) -> bool:
        """Whether the model keeps a recurrent state per sequence: it can be forked, but not taken back by some tokens."""
        return self._scheduler.has_state

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do, or to tell."""
        return self._scheduler.has_unfinished() or self._requests.has_news

    # Life

    def close(self) -> None:
        """End what still runs, free the KV cache. Closing twice is fine."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            for state in self._requests:
                name = state.request.request_id
                self._requests.end(state, "error", EngineClosed(f"the engine was closed before {name} ended"))
            self._settle()
            for sequence in list(self._scheduler.held):
                self._scheduler.held.release(sequence)
            if self._offload is not None:
                self._offload.close()
            self._runner.release()
            if self.model.team is not None and not self.model.team.failed:
                self.model.team.send(Order.CLOSE)
            self.model.adapters.close()
            if self._speculator is not None:
                self._speculator.close()

    def _check_open(self) -> None:
        if self.closed:
            raise EngineClosed("the engine is closed")

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()
