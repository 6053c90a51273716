"""A server's log lines, as text or JSON. They never tell what was asked or answered, nor keys."""

from __future__ import annotations

import json
import logging
import logging.config
import time
import traceback

from ...base.errors import InvalidArgument

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")


def configure(form: str, level: str) -> None:
    """Send all lines of this process, uvicorn's and Python's warnings too, to stderr.

    Raises InvalidArgument for an unknown format or level.
    """
    check(form, level)
    handler = {"class": "logging.StreamHandler", "formatter": form, "stream": "ext://sys.stderr"}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"text": {"()": TextFormatter}, "json": {"()": JsonFormatter}},
            "handlers": {"stderr": handler},
            "root": {"handlers": ["stderr"], "level": "WARNING"},
            "loggers": {
                "hf_paged": {"level": level.upper()},
                "uvicorn": {"level": level.upper(), "handlers": [], "propagate": True},
                "uvicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},  # Observe's lines say more
            },
        }
    )
    logging.captureWarnings(True)


def check(form: str, level: str) -> None:
    if form not in FORMATS:
        raise InvalidArgument(f"log_format must be one of {', '.join(FORMATS)}, got {form!r}")
    if level not in LEVELS:
        raise InvalidArgument(f"log_level must be one of {', '.join(LEVELS)}, got {level!r}")


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, and what the record has in `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line |= _exception(record)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """The same for people: name=value after the message."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_plain(value)}" for name, value in getattr(record, "fields", {}).items())
        line = f"{_time(record)} {record.levelname:7} {record.name}: {_plain(_message(record), spaces=True)}{fields}"
        if record.exc_info:
            told = _exception(record)
            line += f" ({told['exception']})" + "".join(f"\n    {place}" for place in told["stack"])
        return line


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"


def _message(record: logging.LogRecord) -> str:
    """Its first line, where an exception goes with it: the rest may quote the exception, which may quote a request."""
    message = record.getMessage().strip()
    return message.partition("\n")[0] if record.exc_info else message


def _exception(record: logging.LogRecord) -> dict:
    """What an exception was first, and where: without its message, for that may quote what was asked."""
    error = record.exc_info[1]
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    return {"exception": type(error).__name__, "stack": [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]}


def _plain(value, spaces: bool = False) -> str:
    """On one line whatever it is, so that nobody can forge a line."""
    text = str(value)
    fine = text.isprintable() and (spaces or not any(mark in text for mark in ' "='))
    return text if fine and text else json.dumps(text)
