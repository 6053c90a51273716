"""Functions that a model may call, in the form all routes share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from .errors import Refused
from .protocol import AllowedToolsChoice, Function, NamedTool

if TYPE_CHECKING:  # settings know the formats of calls, which know tools
    from .settings import Limits


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One function.

    Attributes:
        name: unlike any other's of the request.
        description: what the model is told about it.
        parameters: a JSON schema of the arguments, which are an object.
        strict: whether arguments must follow the schema whenever it is called.
    """

    name: str
    description: str | None = None
    parameters: dict = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    def for_template(self) -> dict:
        """As chat templates read it."""
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": self.parameters}}


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """
    Attributes:
        mode: "auto": the model decides; "required": it must call at least one; "none": it is told of none.
        names: the only functions it is told of, and may call; None: all.
    """

    mode: Literal["auto", "required", "none"] = "auto"
    names: tuple[str, ...] | None = None


def tools_of(functions: Iterable[Function]) -> list[Tool]:
    """From the form requests have."""
    return [
        Tool(
            name=function.name,
            description=function.description,
            strict=bool(function.strict),
            **({} if function.parameters is None else {"parameters": function.parameters}),
        )
        for function in functions
    ]


def choice_of(choice: str | NamedTool | AllowedToolsChoice | None) -> ToolChoice:
    """From the form chat completions have."""
    if isinstance(choice, NamedTool):
        return ToolChoice(mode="required", names=(choice.function.name,))
    if isinstance(choice, AllowedToolsChoice):
        allowed = choice.allowed_tools
        return ToolChoice(mode=allowed.mode, names=tuple(tool.function.name for tool in allowed.tools))
    return ToolChoice(mode=choice or "auto")


def usable_tools(tools: Sequence[Tool], choice: ToolChoice, limits: Limits) -> dict[str, Tool]:
    """The functions that the model may call, by name. Refuses what is too much, double, unknown or no schema."""
    if len(tools) > limits.tools:
        raise Refused(f"tools: {len(tools)} are more than the {limits.tools} allowed", param="tools", code="too_many")
    named: dict[str, Tool] = {}
    size = 0
    for place, tool in enumerate(tools):
        if tool.name in named:
            param = f"tools.{place}.function.name"
            raise Refused(f"{param}: there are two called {tool.name!r}", param=param, code="invalid_value")
        size += _checked_size(tool, f"tools.{place}.function.parameters")
        if size > limits.tool_characters:
            message = f"tools: their schemas have more than the {limits.tool_characters} characters allowed"
            raise Refused(message, param="tools", code="too_large")
        if "type" not in tool.parameters:
            tool = replace(tool, parameters={"type": "object"} | tool.parameters)
        named[tool.name] = tool
    unknown = next((name for name in choice.names or () if name not in named), None)
    if unknown is not None:
        raise Refused(f"tool_choice: there is no tool called {unknown!r}", param="tool_choice", code="invalid_value")
    if not named and choice.mode == "required":
        raise Refused("tool_choice needs tools", param="tool_choice", code="invalid_value")
    if choice.mode == "none":
        return {}
    return named if choice.names is None else {name: named[name] for name in choice.names}


def _checked_size(tool: Tool, param: str) -> int:
    """Characters of the schema, which must be one of objects: everything that reads it may count on its form."""
    schema = tool.parameters
    try:
        size = len(json.dumps(schema)) + len(tool.description or "")
    except (ValueError, RecursionError):
        raise Refused(f"{param}: the schema is nested too deeply", param=param, code="invalid_value") from None
    properties, required = schema.get("properties", {}), schema.get("required", [])
    wrong = (
        "it must be of type object"
        if schema.get("type", "object") != "object"
        else "its properties must be an object"
        if not isinstance(properties, dict)
        else "its required must be a list of names"
        if not (isinstance(required, list) and all(isinstance(name, str) for name in required))
        else None
    )
    if wrong is not None:
        raise Refused(f"{param}: {wrong}", param=param, code="invalid_value")
    return size


def schema_fault(tools: Sequence[Tool]) -> tuple[int, str] | None:
    """The place of the first tool whose schema makes no grammar, and the reason."""
    from llguidance import LLMatcher

    for place, tool in enumerate(tools):
        reason = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(tool.parameters)))
        if reason:
            return place, reason.strip().splitlines()[0]
    return None
