"""From what a caller asks to a request that is ready to be scheduled. Needs no lock, so many threads may do it at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from ..base.config import EngineConfig
from ..base.errors import InvalidArgument
from ..base.sampling_params import SamplingParams
from ..base.types import RequestOutput
from ..core.request import Request
from ..runtime.constraint import Constraints
from ..runtime.runner import PagedModel
from .checks import check_options, checked_forward_hooks, checked_params, most_new_tokens
from .prompts import prompt_tokens
from .request_state import NO_HOOKS, RequestState, RowHooks, new_request_id


class Intake:
    """Makes the requests of one engine.

    Args:
        max_model_len: most tokens of one sequence.
    """

    def __init__(self, model: PagedModel, tokenizer, config: EngineConfig, max_model_len: int):
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._max_model_len = max_model_len
        self._constraints = Constraints(tokenizer, model.vocab_size)

    def hooks(
        self,
        logits_processors: Iterable[Callable],
        stopping_criteria: Iterable[Callable],
        forward_hooks: Mapping[str, Callable] | None,
    ) -> RowHooks:
        """A caller's functions."""
        processors, criteria = tuple(logits_processors), tuple(stopping_criteria)
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
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str | None = None,
        hooks: RowHooks = NO_HOOKS,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> RequestState:
        """A request that the scheduler does not know yet. Arguments and errors are those of `Engine.add`."""
        arrival = time.monotonic()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidArgument(f"params must be SamplingParams, got {type(params).__name__}")
        if request_id is not None and not isinstance(request_id, str):
            raise InvalidArgument(f"request_id must be a string, got {request_id!r}")
        model, tokenizer = self._model, self._tokenizer
        text, ids = prompt_tokens(prompt, tokenizer, model.vocab_size)
        check_options(deadline, priority, cache_salt, self._config.policy)
        bad_words = checked_params(params, tokenizer, model.vocab_size)
        form = params.structured_outputs
        constraint = None if form is None else self._constraints.compile(form, model.eos_token_ids)
        request = Request(
            request_id=new_request_id() if request_id is None else request_id,
            prompt_token_ids=ids,
            n=params.n,
            max_tokens=most_new_tokens(params, len(ids), self._max_model_len),
            min_tokens=params.min_tokens,
            stop_token_ids=frozenset(params.stop_token_ids or ()),
            eos_token_ids=frozenset() if params.ignore_eos else model.eos_token_ids,
            priority=priority,
            arrival=arrival,
            deadline=None if deadline is None else arrival + deadline,
            cache_salt=cache_salt,
            # a function on activations sees every token of its request, and what it changes is nobody else's
            read_prefix_cache=params.prompt_logprobs is None and not hooks.forward_hooks,
            write_prefix_cache=not hooks.forward_hooks,
            params=params,
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
            callback=on_output,
        )
        return request.state
