"""Functions that a model may call, in the form all routes share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """
    Attributes:
        mode: "auto": the model decides; "required": it must call at least one; "none": it is told of none.
        names: the only functions it may call; None: all.
    """

    mode: Literal["auto", "required", "none"] = "auto"
    names: tuple[str, ...] | None = None
