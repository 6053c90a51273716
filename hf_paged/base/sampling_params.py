"""How one request is sampled: frozen, keyword-only, every field checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real

from .errors import InvalidArgument
from .structured import StructuredOutputsParams

MAX_N = 10_000
MAX_STOP_STRINGS = 64
MAX_BAD_WORDS = 1024
MAX_CHARACTERS = 16_384  # of all stop strings, and of all bad words
MAX_LOGIT_BIAS = 4096
MAX_LOGPROBS = 4096
# Logits divided by less than this could overflow fp32; below it only 0 (greedy) is meaningful.
MIN_TEMPERATURE = 1e-20


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling options of one request. Names and defaults are vLLM's; a wrong value raises InvalidArgument.

    Attributes:
        n: completions to make of the prompt.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the most likely tokens that together have this probability. 1: off.
        top_k: keep the k most likely tokens. 0 or -1: off.
        min_p: drop tokens less likely than this share of the most likely one. 0: off.
        repetition_penalty: over prompt and output; positive logits are divided by it, negative ones multiplied.
        presence_penalty: subtracted from the logit of every token already in the output. -2 to 2.
        frequency_penalty: subtracted once per occurrence in the output. -2 to 2.
        seed: makes the draws reproducible, whatever else is in the batch. None: the engine chooses.
        stop: strings that end the output, a string or a list; kept as a tuple.
        stop_token_ids: tokens that end the output, as EOS does.
        ignore_eos: go on after EOS.
        max_tokens: most output tokens. None: as many as fit.
        min_tokens: EOS, stop tokens and stop strings do not end the output before this many tokens.
        logprobs: report the log-probability of each output token and of this many most likely ones. None: off.
        prompt_logprobs: the same for the prompt's tokens.
        logit_bias: {token id: value added to its logit}.
        bad_words: strings that must not appear; the last token of each is forbidden where it would complete it.
        allowed_token_ids: only these tokens may be sampled.
        structured_outputs: the form the output must have, such as JSON of a schema; a StructuredOutputsParams or a dict of
            its fields. It needs a tokenizer and the package llguidance.
        skip_special_tokens, spaces_between_special_tokens: as in `tokenizer.decode`.
        keep_special_token_ids: special tokens that are in the text in spite of skip_special_tokens, such as marks of tools.
        include_stop_str_in_output: leave the stop string (or stop token) in the text.
        detokenize: make text at all. `stop` needs it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Iterable[str] | None = None
    stop_token_ids: Iterable[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: Iterable[str] | None = None
    allowed_token_ids: Iterable[int] | None = None
    structured_outputs: StructuredOutputsParams | dict | None = None
    skip_special_tokens: bool = True
    keep_special_token_ids: Iterable[int] | None = None
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True

    def __post_init__(self):
        self._check_numbers()
        self._check_collections()
        for name in (
            "ignore_eos",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
            "detokenize",
        ):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_structured()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidArgument(f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})")
        if self.stop and not self.detokenize:
            raise InvalidArgument("stop needs detokenize=True: stop strings are looked for in the text")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def _set(self, name: str, value) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        self._set("n", _integer("n", self.n, 1, MAX_N))
        self._set("temperature", _number("temperature", self.temperature, 0.0, math.inf))
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            raise InvalidArgument(
                f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, got {self.temperature!r}"
            )
        self._set("top_p", _number("top_p", self.top_p, 0.0, 1.0))
        self._set("top_k", max(_integer("top_k", self.top_k, -1, None), 0))
        self._set("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        self._set("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf))
        if not 1e-6 <= self.repetition_penalty <= 1e6:
            raise InvalidArgument(f"repetition_penalty must lie between 1e-6 and 1e6, got {self.repetition_penalty!r}")
        self._set("presence_penalty", _number("presence_penalty", self.presence_penalty, -2.0, 2.0))
        self._set("frequency_penalty", _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        self._set("min_tokens", _integer("min_tokens", self.min_tokens, 0, None))
        for name, low, high in (
            ("seed", -(2**63), 2**64 - 1),
            ("max_tokens", 1, None),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
        ):
            if getattr(self, name) is not None:
                self._set(name, _integer(name, getattr(self, name), low, high))

    def _check_structured(self) -> None:
        if self.structured_outputs is None:
            return
        self._set("structured_outputs", StructuredOutputsParams.of(self.structured_outputs))
        if self.ignore_eos:
            raise InvalidArgument("structured_outputs and ignore_eos exclude each other: EOS ends the form")

    def _check_collections(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        self._set("stop", _strings("stop", stop, MAX_STOP_STRINGS))
        self._set("bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        self._set("keep_special_token_ids", _token_ids("keep_special_token_ids", self.keep_special_token_ids))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise InvalidArgument("allowed_token_ids is empty: no token could be sampled")
            self._set("allowed_token_ids", allowed)
        if self.logit_bias is not None:
            self._set("logit_bias", _bias("logit_bias", self.logit_bias))


def _integer(name: str, value, low: int, high: int | None) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InvalidArgument(f"{name} must be an integer, got {value!r}")
    value = int(value)
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidArgument(f"{name} must be {bounds}, got {value}")
    return value


def _number(name: str, value, low: float, high: float) -> float:
    """A finite float in [low, high]."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InvalidArgument(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        bounds = f"at least {low:g} and finite" if high == math.inf else f"between {low:g} and {high:g}"
        raise InvalidArgument(f"{name} must be {bounds}, got {number!r}")
    return number


def _items(name: str, value, kind: str) -> tuple:
    """The members of a list-like argument; strings, mappings and scalars are mistakes."""
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise InvalidArgument(f"{name} must be a list of {kind}, got {value!r}")
    return tuple(value)


def _strings(name: str, value, limit: int) -> tuple[str, ...]:
    if value is None:
        return ()
    items = _items(name, value, "strings")
    for item in items:
        if not isinstance(item, str) or not item:
            raise InvalidArgument(f"{name} must hold non-empty strings, got {item!r}")
    if len(items) > limit:
        raise InvalidArgument(f"{name} may hold at most {limit} strings, got {len(items)}")
    if (total := sum(map(len, items))) > MAX_CHARACTERS:
        raise InvalidArgument(f"{name} may have at most {MAX_CHARACTERS} characters in all, got {total}")
    return items


def _token_ids(name: str, value) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(_integer(name, item, 0, 2**63 - 1) for item in _items(name, value, "token ids"))


def _bias(name: str, value) -> dict[int, float]:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{name} must map token ids to numbers, got {value!r}")
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidArgument(f"{name} may hold at most {MAX_LOGIT_BIAS} entries, got {len(value)}")
    return {_integer(name, token, 0, 2**63 - 1): _number(name, bias, -1e30, 1e30) for token, bias in value.items()}
