"""From what a caller asks to a request that is ready to be scheduled. Needs no lock, so many threads may do it at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..base.branch import Branch
from ..base.config import EngineConfig
from ..base.errors import InvalidArgument, UnsupportedOption
from ..base.sampling_params import SamplingParams
from ..base.tasks import ClassifyParams, ScoreParams
from ..base.types import RequestOutput
from ..core.request import Request
from ..runtime.constraint import Constraints
from ..runtime.media import NO_MEDIA, Media
from ..runtime.runner import PagedModel
from .branching import Origin, checked_branch, kept_logprobs
from .checks import check_options, checked_forward_hooks, checked_functions, checked_params, most_new_tokens
from .images import Images, has_images, images_of_messages
from .prompts import checked_ids, is_messages, prompt_tokens, render_chat, text_continuations
from .request_state import NO_HOOKS, RequestState, RowHooks, new_request_id
from .tasks import KeepTask, TaskParams, check_head, make_task

_NO_TOKENS = SamplingParams(detokenize=False)  # of tasks, which sample none


class Intake:
    """Makes the requests of one engine.

    Args:
        processor: for prompts with images; None: there is none.
        max_model_len: most tokens of one sequence.
    """

    def __init__(self, model: PagedModel, tokenizer, processor, config: EngineConfig, max_model_len: int):
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._max_model_len = max_model_len
        self._constraints = Constraints(tokenizer, model.vocab_size)
        self.images = Images(processor, model.media, config.images, model.name, model.vocab_size)

    def hooks(
        self,
        logits_processors: Iterable[Callable],
        stopping_criteria: Iterable[Callable],
        forward_hooks: Mapping[str, Callable] | None,
    ) -> RowHooks:
        """A caller's functions."""
        if forward_hooks and self._model.team is not None:
            raise UnsupportedOption("forward_hooks: functions on activations are not run on a sharded model")
        processors = checked_functions("logits_processors", logits_processors)
        criteria = checked_functions("stopping_criteria", stopping_criteria)
        if not processors and not criteria and forward_hooks is None:
            return NO_HOOKS
        return RowHooks(
            processors=processors,
            criteria=criteria,
            forward_hooks=checked_forward_hooks(forward_hooks, self._model.check_module),
        )

    def request(
        self,
        prompt,
        params: SamplingParams | TaskParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        user: str | None = None,
        deadline: float | None = None,
        cache_salt: str | None = None,
        adapter: str | None = None,
        hooks: RowHooks = NO_HOOKS,
        images=None,
        media: Media = NO_MEDIA,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> RequestState:
        """A request that the scheduler does not know yet. Arguments and errors are those of `Engine.add`.

        Args:
            media: the images of a prompt given as token ids, read before (instead of `images`).
        """
        arrival = time.monotonic()
        if params is None:
            params = prompt.params if isinstance(prompt, Branch) and prompt.params is not None else SamplingParams()
        if not isinstance(params, SamplingParams | TaskParams):
            kind = type(params).__name__
            names = "SamplingParams, EmbedParams, ScoreParams or ClassifyParams"
            raise InvalidArgument(f"params must be {names}, got {kind}")
        if request_id is not None and not isinstance(request_id, str):
            raise InvalidArgument(f"request_id must be a string, got {request_id!r}")
        if on_output is not None and not callable(on_output):
            raise InvalidArgument(f"on_output must be a function, got {type(on_output).__name__}")
        check_head(params, self._model)
        if isinstance(prompt, Branch):
            branch = checked_branch(prompt, dict(adapter=adapter, cache_salt=cache_salt, images=images))
            adapter, cache_salt = branch.adapter, branch.cache_salt
            text, ids, media = self._of_branch(branch, params)
        else:
            branch = None
            pairs = isinstance(params, ClassifyParams)
            text, ids, media = self._prompt(prompt, images, media, pairs=pairs)
        number = self._model.adapters.number(adapter)
        if media.spans and self._model.adapters.changes_images(number):
            raise UnsupportedOption(
                f"adapter {adapter!r} changes more than the language model's layers, or runs on PEFT's modules, and images are "
                "encoded without one"
            )
        check_options(deadline, priority, user, cache_salt, self._config.policy)
        common = dict(
            request_id=new_request_id() if request_id is None else request_id,
            priority=priority,
            user=user,
            arrival=arrival,
            deadline=None if deadline is None else arrival + deadline,
            cache_salt=cache_salt,
            adapter=number,
            media=media.spans,
            # a function on activations sees every token of its request, and what it changes is nobody else's
            write_prefix_cache=not hooks.forward_hooks,
            params=params,
        )
        if isinstance(params, SamplingParams):
            state = self._generating(params, text, ids, hooks, common, branch)
            if hooks.row is None:
                state.output.origin = Origin(params, adapter, cache_salt, media, bool(hooks.forward_hooks))
        else:
            state = self._task(params, text, ids, hooks, common)
        state.callback = on_output
        state.media = media
        return state

    def _of_branch(self, branch: Branch, params) -> tuple[str | None, list[int], Media]:
        """The same of a prompt whose output has begun."""
        if not isinstance(params, SamplingParams):
            raise InvalidArgument(f"prompt: a Branch goes on with SamplingParams, not with {type(params).__name__}")
        ids = checked_ids(branch.prompt_token_ids, self._model.vocab_size)
        return branch.prompt, ids, NO_MEDIA if branch.media is None else branch.media

    def _prompt(self, prompt, images, media: Media, *, pairs: bool) -> tuple[str | None, list[int], Media]:
        """(text or None, token ids, media) of a prompt as users give it."""
        size, processor = self._model.vocab_size, self.images.processor
        if images is not None and hasattr(images, "__len__") and not len(images):
            images = None
        chat = is_messages(prompt) and (processor is not None or images is not None or has_images(prompt))
        if chat:
            prompt, images = images_of_messages(prompt, images)
            template = processor if getattr(processor, "chat_template", None) else self._tokenizer
            prompt = render_chat(_in_parts(prompt) if template is processor else prompt, template)
        if isinstance(prompt, str) and (images is not None or chat):
            special = not (chat and prompt.startswith(self._tokenizer.bos_token or "\0"))  # as transformers' processors do
            if images is not None:
                return prompt, *self.images.of_text(prompt, images, add_special_tokens=special)
            ids = checked_ids(self._tokenizer(prompt, add_special_tokens=special)["input_ids"], size)
            self.images.check_none(ids)
            return prompt, ids, media
        text, ids = prompt_tokens(prompt, self._tokenizer, size, pairs=pairs)
        if images is not None:
            media = self.images.of_ids(ids, images)
        elif text is not None:
            self.images.check_none(ids)
        return text, ids, media

    def _generating(
        self,
        params: SamplingParams,
        text: str | None,
        ids: list[int],
        hooks: RowHooks,
        common: dict,
        branch: Branch | None,
    ) -> RequestState:
        model, tokenizer = self._model, self._tokenizer
        bad_words = checked_params(params, tokenizer, model.vocab_size)
        form = params.structured_outputs
        constraint = hooks.constraint if form is None else self._constraints.compile(form, model.eos_token_ids)
        begun = []
        if branch is not None and len(branch.output_token_ids):
            begun = checked_ids(branch.output_token_ids, model.vocab_size, "output_token_ids")
        request = Request(
            **common,
            prompt_token_ids=ids,
            begun=begun,
            n=params.n,
            max_tokens=most_new_tokens(params, len(ids), self._max_model_len),
            min_tokens=params.min_tokens,
            stop_token_ids=frozenset(params.stop_token_ids or ()),
            eos_token_ids=frozenset() if params.ignore_eos else model.eos_token_ids,
            max_cached_tokens=None if params.prompt_logprobs is None and not hooks.forward_hooks else 0,
        )
        request.state = RequestState(
            request,
            params,
            prompt=text,
            tokenizer=tokenizer,
            seed=params.seed,
            bad_words_ids=bad_words,
            constraint=constraint,
            hooks=hooks,
            begun_logprobs=None if branch is None else kept_logprobs(branch, params.logprobs),
        )
        if begun:
            request.state.check_begun()
        return request.state

    def prefix(self, prompt, images, adapter: str | None, cache_salt: str | bytes | None) -> RequestState:
        """A request that only computes a prompt, as `request` takes it; of a Branch, with the output that has begun."""
        check_options(None, 0, None, cache_salt, self._config.policy)
        if isinstance(prompt, Branch):
            branch = checked_branch(prompt, dict(adapter=adapter, cache_salt=cache_salt, images=images))
            adapter, cache_salt = branch.adapter, branch.cache_salt
            text, media = branch.prompt, NO_MEDIA if branch.media is None else branch.media
            ids = checked_ids([*branch.prompt_token_ids, *branch.output_token_ids], self._model.vocab_size)
        else:
            text, ids, media = self._prompt(prompt, images, NO_MEDIA, pairs=False)
        request = Request(
            request_id=new_request_id(),
            prompt_token_ids=ids,
            max_tokens=0,
            cache_salt=cache_salt,
            adapter=self._model.adapters.number(adapter),
            media=media.spans,
            params=_NO_TOKENS,
        )
        request.state = RequestState(
            request, _NO_TOKENS, prompt=text, tokenizer=self._tokenizer, seed=0, hooks=NO_HOOKS, task=KeepTask()
        )
        request.state.media = media
        return request.state

    def _task(
        self, params: TaskParams, text: str | None, ids: list[int], hooks: RowHooks, common: dict
    ) -> RequestState:
        model, continuation = self._model, []
        if hooks.processors or hooks.criteria:
            name = "logits_processors" if hooks.processors else "stopping_criteria"
            raise InvalidArgument(f"{name} have nothing to do with {type(params).__name__}, which samples no tokens")
        if isinstance(params, ClassifyParams):
            ids = model.classified(ids)
        elif isinstance(params, ScoreParams):
            (continuation,) = self.continuations(text, ids, [params.continuation])
        task = make_task(params, ids, continuation, model)
        request = Request(
            **common,
            prompt_token_ids=ids + continuation[:-1],  # nobody asks what comes after the last
            max_tokens=0,
            max_cached_tokens=0 if hooks.forward_hooks else task.max_cached_tokens,
        )
        request.state = RequestState(
            request,
            _NO_TOKENS,
            prompt=text,
            prompt_token_ids=ids,
            tokenizer=self._tokenizer,
            seed=0,
            hooks=hooks,
            task=task,
        )
        return request.state

    def continuations(self, text: str | None, ids: list[int], given: list[str | Sequence[int]]) -> list[list[int]]:
        """Token ids of continuations of a prompt, each as in ScoreParams.

        Args:
            text: the prompt's; None if it was given as token ids.
        """
        texts = [one for one in given if isinstance(one, str)]
        tokens = iter(text_continuations(text, ids, texts, self._tokenizer))
        size = self._model.vocab_size
        return [next(tokens) if isinstance(one, str) else checked_ids(one, size, "continuation") for one in given]

    def scored(self, prompt, given: list, images=None) -> tuple[list[int], Media, list[ScoreParams]]:
        """A prompt as token ids and media, which are made once for all its continuations, and theirs.

        Raises InvalidArgument if a continuation is empty, or neither text nor token ids.
        """
        check_head(ScoreParams(continuation=(0,)), self._model)
        asked = [ScoreParams(continuation=one).continuation for one in given]
        text, ids, media = self._prompt(prompt, images, NO_MEDIA, pairs=False)
        return ids, media, [ScoreParams(continuation=tokens) for tokens in self.continuations(text, ids, asked)]


def _in_parts(messages: list[dict]) -> list[dict]:
    """Messages whose contents are lists of parts, as templates of processors take them."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message, dict) and isinstance(message.get("content"), str)
        else message
        for message in messages
    ]
