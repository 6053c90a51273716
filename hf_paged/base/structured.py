"""What form an output must have."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import InvalidArgument

MAX_CHARACTERS = 256 * 1024  # of a schema, regular expression or grammar, or of all choices
MAX_CHOICES = 4096
FORMS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """The form an output must have: exactly one of `FORMS`. Names are vLLM's; a wrong value raises InvalidArgument.

    Tokens that would break the form cannot be sampled, and EOS only where the output is complete. An output that reaches
    `max_tokens` first is cut off. Where only one text can follow, only the tokens remain that usually stand for it.

    Attributes:
        json: a JSON schema as a dict or as text; kept as text.
        json_object: any JSON object.
        regex: a regular expression that all of the output must match: Rust's syntax, so no backreferences or lookaround.
        choice: the output is one of these strings; kept as a tuple.
        grammar: a context-free grammar in Lark's syntax, as llguidance reads it; its start rule is `start`.
        disable_any_whitespace: JSON without spaces and line breaks between its parts.
        whitespace_pattern: a regular expression for them; with `json` and `json_object`.
    """

    json: str | dict | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self):
        given = [name for name in FORMS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise InvalidArgument(
                f"structured_outputs needs exactly one of {', '.join(FORMS)}; it has {' and '.join(given) or 'none'}"
            )
        name = given[0]
        if name == "json":
            object.__setattr__(self, "json", _schema(self.json))
        elif name == "choice":
            object.__setattr__(self, "choice", _choices(self.choice))
        elif name == "json_object" and self.json_object is not True:
            raise InvalidArgument(f"structured_outputs: json_object must be True or False, got {self.json_object!r}")
        elif name in ("regex", "grammar"):
            _check_text(name, getattr(self, name))
        if not isinstance(self.disable_any_whitespace, bool):
            raise InvalidArgument(
                f"structured_outputs: disable_any_whitespace must be True or False, got {self.disable_any_whitespace!r}"
            )
        if self.whitespace_pattern is not None:
            _check_text("whitespace_pattern", self.whitespace_pattern)
        if name not in ("json", "json_object") and (self.disable_any_whitespace or self.whitespace_pattern is not None):
            raise InvalidArgument(f"structured_outputs: whitespace is a matter of json and json_object, not of {name}")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise InvalidArgument("structured_outputs: disable_any_whitespace and whitespace_pattern exclude each other")

    @classmethod
    def of(cls, form: StructuredOutputsParams | dict) -> StructuredOutputsParams:
        """`form`, or made of a dict of its fields."""
        if isinstance(form, cls):
            return form
        if not isinstance(form, dict):
            raise InvalidArgument(f"structured_outputs must be a StructuredOutputsParams or a dict, got {form!r}")
        unknown = sorted(map(str, form.keys() - cls.__dataclass_fields__.keys()))
        if unknown:
            raise InvalidArgument(f"structured_outputs has no field {unknown[0]!r}")
        return cls(**form)

    @property
    def form(self) -> str:
        """The one of FORMS that is given."""
        return next(name for name in FORMS if getattr(self, name) not in (None, False))


def _schema(schema) -> str:
    """The schema as text. Whether it is a valid one, the compiler says."""
    if isinstance(schema, str):
        _check_text("json", schema)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"structured_outputs: json is no JSON text: {error}") from None
    if not isinstance(schema, dict | bool):
        raise InvalidArgument(f"structured_outputs: json must be a schema, got {type(schema).__name__}")
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"structured_outputs: json cannot be written as JSON: {error}") from None
    _check_text("json", text)
    return text


def _choices(choice) -> tuple[str, ...]:
    if isinstance(choice, str | bytes | dict) or not isinstance(choice, Iterable):
        raise InvalidArgument(f"structured_outputs: choice must be a list of strings, got {choice!r}")
    choices = tuple(choice)
    if not choices or not all(isinstance(item, str) and item for item in choices):
        raise InvalidArgument("structured_outputs: choice must hold non-empty strings")
    if len(choices) > MAX_CHOICES:
        raise InvalidArgument(f"structured_outputs: choice may hold at most {MAX_CHOICES} strings, got {len(choices)}")
    _check_text("choice", "".join(choices))
    return choices


def _check_text(name: str, text) -> None:
    if not isinstance(text, str) or not text:
        raise InvalidArgument(f"structured_outputs: {name} must be a non-empty string, got {text!r}")
    if len(text) > MAX_CHARACTERS:
        raise InvalidArgument(
            f"structured_outputs: {name} may have at most {MAX_CHARACTERS} characters, got {len(text)}"
        )
