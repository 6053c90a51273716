"""Sizes in bytes, as users give them."""

from __future__ import annotations

from .errors import InvalidArgument


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes from an int or a string such as "512MiB" or "2GB" (decimal and binary units)."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    if isinstance(value, str):
        text = value.strip().lower()
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
        unit = text[len(digits) :].strip()
        try:
            amount = float(digits) * units[unit]
        except (ValueError, KeyError):
            raise InvalidArgument(f'{name} must be bytes or a size such as "2GiB", got {value!r}') from None
        value = int(amount) if amount == amount and amount not in (float("inf"), float("-inf")) else 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgument(f"{name} must be a positive number of bytes, got {value!r}")
    return value
