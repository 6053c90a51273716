"""Which formats a model uses, and what follows from it: how its answers are read, and how they are made to be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ....base.errors import InvalidArgument
from ..pieces import Piece
from ..tools import Tool
from .deepseek import DeepSeekV3, DeepSeekV31
from .formats import CallFormat, ReasoningFormat, State
from .harmony import Harmony
from .hermes import Hermes
from .llama3_json import Llama3JSON
from .mistral import Mistral
from .pythonic import LFM2, Pythonic
from .qwen3_coder import Qwen3Coder
from .response_template import ResponseTemplate
from .scanner import Scanner
from .think import DeepSeekR1, MistralThink, Think

AUTO, NONE = "auto", "none"
_CALLS = (Hermes, Qwen3Coder, Llama3JSON, Mistral, Pythonic, LFM2, DeepSeekV3, DeepSeekV31, Harmony)
_REASONING = (Think, DeepSeekR1, MistralThink)
CALL_FORMATS = (*(kind.name for kind in _CALLS), ResponseTemplate.name)
REASONING_FORMATS = tuple(kind.name for kind in _REASONING)
_PIECE = 4096  # characters looked at together: some searches look at all of them again and again


@dataclass(frozen=True)
class Dialect:
    """The formats of one model.

    Attributes:
        calls: None: it cannot call functions, as far as is known.
        reasoning: None: it does not reason, or `calls` reads that, too (`calls.reasons`).
        special: the tokenizer's special tokens, by their text.
    """

    calls: CallFormat | None = None
    reasoning: ReasoningFormat | None = None
    special: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer, calls: str = AUTO, reasoning: str = AUTO) -> Dialect:
        """
        Args:
            calls: one of CALL_FORMATS, "none", or "auto": what the chat template, or else the tokenizer, tells.
            reasoning: the same of REASONING_FORMATS.

        Raises InvalidArgument for another name, or two formats that exclude each other.
        """
        check_names(calls, reasoning)
        special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        text = _template_text(tokenizer)
        call_format = _call_format(_detect_calls(text, tokenizer) if calls == AUTO else calls, tokenizer)
        if call_format is not None and call_format.reasons:
            if reasoning != AUTO:
                raise InvalidArgument(f"reasoning_parser must be auto: {call_format.name} reads the reasoning, too")
            return cls(call_format, None, special)
        return cls(call_format, _reasoning_format(_detect_reasoning(text) if reasoning == AUTO else reasoning), special)

    @property
    def names(self) -> dict[str, str | None]:
        """What is chosen, for whoever looks."""
        calls = None if self.calls is None else self.calls.name
        if self.calls is not None and self.calls.reasons:
            return {"tool_parser": calls, "reasoning_parser": calls}
        return {"tool_parser": calls, "reasoning_parser": None if self.reasoning is None else self.reasoning.name}

    def with_calls(self, wanted: bool) -> Dialect:
        """The formats that a request needs: that of calls only if it has tools, or reasoning would stay in the text."""
        return (
            self if wanted or self.calls is None or self.calls.reasons else Dialect(None, self.reasoning, self.special)
        )

    @property
    def silent(self) -> bool:
        """Whether all text is for the user."""
        return self.calls is None and self.reasoning is None

    @property
    def markers(self) -> dict[str, int]:
        """The special tokens that have to show, so that the formats see them."""
        formats = [part for part in (self.calls, self.reasoning) if part is not None]
        return {text: self.special[text] for part in formats for text in part.markers if text in self.special}

    def state(self, prompt: str, continued: str | None) -> State:
        return "ended" if self.reasoning is None else self.reasoning.state(prompt, continued)


class AnswerReader:
    """The pieces of one answer.

    Args:
        dialect: of the request, see `Dialect.with_calls`.
        prompt, state: what the answer follows; see ReasoningFormat.
        one_call: calls after the first are left out.
        hide_markers: special tokens that only the formats may see.
    """

    def __init__(
        self,
        dialect: Dialect,
        tools: Mapping[str, Tool],
        *,
        prompt: str,
        state: State,
        one_call: bool = False,
        hide_markers: bool = True,
    ):
        hidden = tuple(dialect.markers) if hide_markers else ()
        calls = dialect.calls
        ids = {} if calls is None else {"new_id": calls.new_id}
        self._scanner = Scanner(tools, one_call=one_call, hidden=hidden, **ids)
        self._reading = self._read(dialect, tools, prompt, state)
        next(self._reading)

    def _read(self, dialect: Dialect, tools: Mapping[str, Tool], prompt: str, state: State):
        if dialect.reasoning is not None:
            yield from dialect.reasoning.read(self._scanner, state)
        if dialect.calls is None:
            yield from self._scanner.plain()
        else:
            yield from dialect.calls.read(self._scanner, tools, prompt)
        yield  # the end; nothing asks for more

    def feed(self, text: str) -> list[Piece]:
        for start in range(0, len(text), _PIECE):
            self._scanner.feed(text[start : start + _PIECE])
            next(self._reading)
        return self._scanner.pieces()

    def end(self) -> list[Piece]:
        """The pieces that are left when no more text comes."""
        self._scanner.end()
        next(self._reading)
        return self._scanner.pieces()

    @property
    def called(self) -> bool:
        return self._scanner.num_calls > 0

    @property
    def turns(self) -> Sequence[int]:
        """Characters of the text after which reasoning began, ended, began ..."""
        return self._scanner.turns


def check_names(calls: str, reasoning: str) -> None:
    """Raises InvalidArgument for a name that no format has; it lists those there are."""
    for setting, name, known in (
        ("tool_parser", calls, CALL_FORMATS),
        ("reasoning_parser", reasoning, REASONING_FORMATS),
    ):
        if name not in (AUTO, NONE, *known):
            raise InvalidArgument(f"{setting} must be one of auto, none, {', '.join(known)}; got {name!r}")


def _call_format(name: str, tokenizer) -> CallFormat | None:
    if name != ResponseTemplate.name:
        return next((kind() for kind in _CALLS if kind.name == name), None)
    if not getattr(tokenizer, "response_template", None):
        raise InvalidArgument(f"tool_parser: {name} needs a tokenizer with a response_template; this one has none")
    return ResponseTemplate(tokenizer)


def _reasoning_format(name: str) -> ReasoningFormat | None:
    return next((kind() for kind in _REASONING if kind.name == name), None)


def _template_text(tokenizer) -> str:
    """All chat templates of the tokenizer."""
    template = getattr(tokenizer, "chat_template", None) or ""
    text = template if isinstance(template, str) else "\n".join(template.values())
    return text.replace('\\"', '"')  # as it reads within quotes


def _detect_calls(text: str, tokenizer) -> str:
    """By what only templates of that format have in them."""
    for name, signs in (
        (Harmony.name, ("<|channel|>", "<|message|>", "commentary")),
        (DeepSeekV3.name, ("<｜tool▁call▁begin｜>", "```json")),
        (DeepSeekV31.name, ("<｜tool▁call▁begin｜>",)),
        (Mistral.name, ("[TOOL_CALLS]",)),
        (Qwen3Coder.name, ("<function=", "<parameter=")),
        (LFM2.name, ("<|tool_call_start|>",)),
        (LFM2.name, ("<|tool_list_start|>",)),
        (Hermes.name, ("<tool_call>", "arguments")),
        (Pythonic.name, ("func_name1(params_name1=",)),
        (Llama3JSON.name, ('{"name": function name, "parameters"',)),
    ):
        if all(sign in text for sign in signs) and not (name == Hermes.name and "<arg_key>" in text):
            return name
    return ResponseTemplate.name if getattr(tokenizer, "response_template", None) else NONE


def _detect_reasoning(text: str) -> str:
    if MistralThink.begin in text:
        return MistralThink.name
    if Think.end in text:  # of a tag the template never writes, it can only cut off what models write by themselves
        return Think.name if Think.begin in text else DeepSeekR1.name
    return NONE
