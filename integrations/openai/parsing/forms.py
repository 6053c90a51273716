"""The form of a whole answer: reasoning, then calls or content, as a request demands them."""

from __future__ import annotations

from collections.abc import Sequence

from ....base.structured import StructuredOutputsParams
from ..errors import Refused
from ..tools import Tool
from .dialect import Dialect
from .formats import State
from .lark import Lark


def answer_form(
    dialect: Dialect,
    state: State,
    form: StructuredOutputsParams | None,
    tools: Sequence[Tool],
    *,
    required: bool,
    one_call: bool,
) -> StructuredOutputsParams | None:
    """
    Args:
        state: of the reasoning, see `Dialect.state`.
        form: of the content, if a request wants one.
        tools: that may be called; with none of them strict, and not `required`, nothing is demanded of calls.
        one_call: at most one. Without `required` only the reader sees to that.

    Raises Refused where the model's format has no grammar, or none that can tell calls from content of that form.
    """
    calls, reasoning = dialect.calls, dialect.reasoning
    plain = state == "ended" and (calls is None or not calls.reasons)
    if not required and form is None and not any(tool.strict for tool in tools):
        return None
    if plain and not tools:
        return form
    lark = Lark(dialect.special)
    if reasoning is not None:
        lead = reasoning.expression(lark, state)
    else:
        lead = "" if calls is None else calls.lead(lark)
    content = None if form is None else _content(dialect, lark, form)
    if not tools:
        body = content
    elif required:
        body = _calls(dialect, lark, tools, one_call)
    elif content is None:
        free = calls.free(lark, tools, "" if reasoning is None else reasoning.held(state))
        body = _there(free, dialect)
    elif calls.marker is None:
        message = "response_format: with tools, this model's calls cannot be told from an answer of such a form"
        raise Refused(message, param="response_format", code="unsupported")
    else:
        body = f"({_calls(dialect, lark, tools, one_call)} | {content})"
    return StructuredOutputsParams(grammar=lark.grammar(f"{lead} {body}"))


def _content(dialect: Dialect, lark: Lark, form: StructuredOutputsParams) -> str:
    """An answer without calls, whose content has the form."""
    if dialect.calls is None:
        return lark.form(form)
    content = dialect.calls.saying(lark, lark.form(form))
    if content is None:
        name = dialect.calls.name
        message = f"response_format: the format {name!r} of this model's answers can be read, but not enforced"
        raise Refused(message, param="response_format", code="unsupported")
    return content


def _calls(dialect: Dialect, lark: Lark, tools: Sequence[Tool], one_call: bool) -> str:
    """One call, or one and more."""
    begin = "" if dialect.calls.marker is None else lark.literal(dialect.calls.marker)
    return _there(dialect.calls.calls(lark, tools, begin, not one_call), dialect)


def _there(expression: str | None, dialect: Dialect) -> str:
    if expression is None:
        name = dialect.calls.name
        message = f"tools: the format {name!r} of calls can be read, but neither strict nor tool_choice enforced"
        raise Refused(message, param="tools", code="unsupported")
    return expression
