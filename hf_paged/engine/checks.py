"""What `add` is given, checked where that takes the model, the tokenizer or the configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ..base.errors import InvalidArgument, RequestTooLarge
from ..base.sampling_params import SamplingParams
from .text import encode_bad_words

MAX_NAME = 4096  # characters of a user's, characters or bytes of a salt
MAX_DEADLINE = 1e9  # seconds


def checked_params(params: SamplingParams, tokenizer, vocab_size: int) -> list[list[int]]:
    """Raise InvalidArgument for what this engine cannot do. Returns the tokens of `bad_words`."""
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        for token in getattr(params, name) or ():
            if not 0 <= token < vocab_size:
                raise InvalidArgument(f"{name} has {token}, outside the vocabulary of {vocab_size} tokens")
    if tokenizer is None and (params.stop or params.bad_words):
        raise InvalidArgument(f"{'stop' if params.stop else 'bad_words'} needs an engine with a tokenizer")
    return encode_bad_words(tokenizer, params.bad_words) if params.bad_words else []


def check_options(deadline, priority, user, cache_salt, policy: str) -> None:
    """Raise InvalidArgument for a wrong deadline, priority, user or salt."""
    if deadline is not None:
        number = isinstance(deadline, (int, float)) and not isinstance(deadline, bool)
        if not number or not 0 < deadline <= MAX_DEADLINE:
            raise InvalidArgument(f"deadline must be a positive number of seconds, at most 1e9, got {deadline!r}")
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise InvalidArgument(f"priority must be an integer, got {priority!r}")
    if priority and policy != "priority":
        raise InvalidArgument(f"priority has no effect under policy {policy!r}; use EngineConfig(policy='priority')")
    if user is not None and not isinstance(user, str):
        raise InvalidArgument(f"user must be a string, got {user!r}")
    if user is not None and len(user) > MAX_NAME:
        raise InvalidArgument(f"user may have at most {MAX_NAME} characters, got {len(user)}")
    if user is not None and policy != "fair":
        raise InvalidArgument(f"user has no effect under policy {policy!r}; use EngineConfig(policy='fair')")
    if cache_salt is not None and not isinstance(cache_salt, (str, bytes)):
        raise InvalidArgument(f"cache_salt must be a string or bytes, got {type(cache_salt).__name__}")
    if cache_salt is not None and len(cache_salt) > MAX_NAME:
        raise InvalidArgument(f"cache_salt may have at most {MAX_NAME} characters, got {len(cache_salt)}")


def most_new_tokens(params: SamplingParams, prompt_length: int, max_model_len: int) -> int:
    """How many tokens a prompt may get. Raises RequestTooLarge if there is not room for one."""
    room = max_model_len - prompt_length
    if room < 1:
        raise RequestTooLarge(
            f"prompt has {prompt_length} tokens; with at least one to generate it exceeds the {max_model_len} tokens of "
            "max_model_len"
        )
    return room if params.max_tokens is None else min(params.max_tokens, room)


def checked_functions(name: str, functions: Iterable[Callable]) -> tuple[Callable, ...]:
    """What a caller gives as a list of functions. Raises InvalidArgument, with `name`, for anything else."""
    if isinstance(functions, str | bytes | Mapping) or not isinstance(functions, Iterable):
        raise InvalidArgument(f"{name} must be a list of functions, got {type(functions).__name__}")
    functions = tuple(functions)
    for function in functions:
        if not callable(function):
            raise InvalidArgument(f"{name} must hold functions, got {type(function).__name__}")
    return functions


def checked_forward_hooks(
    forward_hooks: Mapping[str, Callable] | None, check_module: Callable[[str], None]
) -> dict[str, Callable]:
    """A request's activation hooks. `check_module` raises InvalidArgument for what is no module of the model."""
    if forward_hooks is None:
        return {}
    if not isinstance(forward_hooks, Mapping):
        raise InvalidArgument(f"forward_hooks must map module names to functions, got {type(forward_hooks).__name__}")
    for name, function in forward_hooks.items():
        check_module(name)
        if not callable(function):
            raise InvalidArgument(f"forward_hooks: {name!r} needs a function, got {type(function).__name__}")
    return dict(forward_hooks)
