"""How models write reasoning and calls of functions: one format a file, and `Dialect`, which chooses for a model."""

from .dialect import CALL_FORMATS, REASONING_FORMATS, AnswerReader, Dialect, check_names
from .forms import answer_form

__all__ = ["CALL_FORMATS", "REASONING_FORMATS", "AnswerReader", "Dialect", "answer_form", "check_names"]
