"""Prompts as users give them, checked and turned into token ids."""

from __future__ import annotations

from collections.abc import Mapping, Set
from numbers import Integral

from ..base.errors import InvalidArgument


def prompt_tokens(prompt, tokenizer, vocab_size: int, *, pairs: bool = False) -> tuple[str | None, list[int]]:
    """(text or None, token ids) of a prompt given as text, chat messages or token ids; with `pairs` also as two texts.

    Raises InvalidArgument, naming what is wrong.
    """
    if pairs and isinstance(prompt, tuple) and prompt and isinstance(prompt[0], str):
        return None, _pair(prompt, tokenizer, vocab_size)
    if isinstance(prompt, str) or is_messages(prompt):
        if tokenizer is None:
            raise InvalidArgument("prompt is text, but the engine has no tokenizer; give token ids or a tokenizer")
        text = prompt if isinstance(prompt, str) else render_chat(prompt, tokenizer)
        ids = tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
        return text, checked_ids(ids, vocab_size)
    return None, checked_ids(prompt, vocab_size)


def _pair(prompt: tuple, tokenizer, vocab_size: int) -> list[int]:
    if tokenizer is None:
        raise InvalidArgument("prompt is a pair of texts, but the engine has no tokenizer; give token ids or a tokenizer")
    if len(prompt) != 2 or not all(isinstance(text, str) for text in prompt):
        raise InvalidArgument(f"prompt must be a pair of texts, got a tuple of {len(prompt)}")
    return checked_ids(tokenizer(*prompt)["input_ids"], vocab_size)


def text_continuations(prompt: str | None, ids: list[int], texts: list[str], tokenizer) -> list[list[int]]:
    """Token ids of texts that follow a prompt, whose ids these are.

    They are those that the whole text has after the prompt's; where a token reaches across the boundary, or the prompt
    was given as token ids, each text is tokenized by itself.
    """
    if not texts:
        return []
    if tokenizer is None:
        raise InvalidArgument("continuation is text, but the engine has no tokenizer; give token ids or a tokenizer")
    alone = tokenizer(texts, add_special_tokens=False)["input_ids"]
    wholes: list[list[int]] = [[]] * len(texts)
    if prompt is not None:
        bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        special = len(ids) - len(bare)  # what the tokenizer adds stands in front, or not between the two texts
        if ids[special:] == bare:
            wholes = tokenizer([prompt + text for text in texts], add_special_tokens=False)["input_ids"]
            wholes = [ids[:special] + whole for whole in wholes]
    found = [
        whole[len(ids) :] if whole[: len(ids)] == ids and len(whole) > len(ids) else tokens
        for whole, tokens in zip(wholes, alone, strict=True)
    ]
    for text, tokens in zip(texts, found, strict=True):
        if not tokens:
            raise InvalidArgument(f"continuation {text!r} has no tokens")
    return found


def is_messages(prompt) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def render_chat(messages: list[dict], tokenizer) -> str:
    """The text of chat messages, by the template of a tokenizer or processor.

    Raises InvalidArgument if there is none, or it does not like the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidArgument("prompt is a list of messages, but the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises on messages it does not like
        raise InvalidArgument(f"prompt: the chat template refused the messages: {error}") from error


def checked_ids(prompt, vocab_size: int, name: str = "prompt") -> list[int]:
    """Token ids as a list of ints. Raises InvalidArgument, with `name`, for anything else."""
    try:
        if isinstance(prompt, bytes | bytearray | Mapping | Set):  # iterable, and not in the order of a text
            raise TypeError
        ids = list(prompt.tolist() if hasattr(prompt, "tolist") else prompt)
    except TypeError:
        raise InvalidArgument(f"{name} must be text, messages or token ids, got {type(prompt).__name__}") from None
    if not ids:
        raise InvalidArgument(f"{name} is empty")
    for position, token in enumerate(ids):
        if type(token) is not int:
            if not isinstance(token, Integral) or isinstance(token, bool):
                raise InvalidArgument(f"{name} must be a flat list of token ids, got {token!r} at {position}")
            token = ids[position] = int(token)
        if not 0 <= token < vocab_size:
            raise InvalidArgument(f"{name} has token id {token} at {position}, outside the vocabulary of {vocab_size}")
    return ids
