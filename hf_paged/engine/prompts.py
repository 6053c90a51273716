"""Prompts as users give them, checked and turned into token ids."""

from __future__ import annotations

from ..base.errors import InvalidArgument


def prompt_tokens(prompt, tokenizer, vocab_size: int) -> tuple[str | None, list[int]]:
    """(text or None, token ids) of a prompt given as text, chat messages or token ids.

    Raises InvalidArgument, naming what is wrong.
    """
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], dict)):
        if tokenizer is None:
            raise InvalidArgument("prompt is text, but the engine has no tokenizer; give token ids or a tokenizer")
        text = prompt if isinstance(prompt, str) else _render_chat(prompt, tokenizer)
        ids = tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
        return text, _checked_ids(ids, vocab_size)
    return None, _checked_ids(prompt, vocab_size)


def _render_chat(messages: list[dict], tokenizer) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidArgument("prompt is a list of messages, but the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises on messages it does not like
        raise InvalidArgument(f"prompt: the chat template refused the messages: {error}") from error


def _checked_ids(prompt, vocab_size: int) -> list[int]:
    try:
        ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    except TypeError:
        raise InvalidArgument(f"prompt must be text, messages or token ids, got {type(prompt).__name__}") from None
    if not ids:
        raise InvalidArgument("prompt is empty")
    for position, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool):
            raise InvalidArgument(f"prompt must be a flat list of token ids, got {token!r} at {position}")
        if not 0 <= token < vocab_size:
            raise InvalidArgument(f"prompt has token id {token} at {position}, outside the vocabulary of {vocab_size}")
    return ids
