"""Log-probabilities in the forms OpenAI's two kinds of answers have."""

from __future__ import annotations

from ...base.types import Logprob


def chat_logprobs(tokens: list[int], entries: list[dict[int, Logprob]], num_top: int) -> dict:
    return {"content": [_chat_entry(token, entry, num_top) for token, entry in zip(tokens, entries)], "refusal": None}


def _chat_entry(token: int, entry: dict[int, Logprob], num_top: int) -> dict:
    top = sorted(entry.values(), key=lambda one: one.rank)[:num_top]
    return {**_named(entry[token]), "top_logprobs": [_named(one) for one in top]}


def _named(one: Logprob) -> dict:
    text = one.decoded or ""
    return {"token": text, "logprob": one.logprob, "bytes": list(text.encode())}


class CompletionLogprobs:
    """Builds the parallel lists of a completion; offsets count characters from the beginning of the text."""

    def __init__(self, num_top: int, offset: int = 0):
        self._num_top, self._offset = num_top, offset

    def lists(self, tokens: list[int], entries: list[dict[int, Logprob] | None]) -> dict:
        """Of the next tokens. An entry of None, as the first token of a prompt has, is passed on as null."""
        result: dict = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in zip(tokens, entries):
            text = "" if entry is None else entry[token].decoded or ""
            top = None if entry is None else sorted(entry.values(), key=lambda one: one.rank)[: self._num_top]
            result["tokens"].append(text)
            result["token_logprobs"].append(None if entry is None else entry[token].logprob)
            result["top_logprobs"].append(None if top is None else {one.decoded or "": one.logprob for one in top})
            result["text_offset"].append(self._offset)
            self._offset += len(text)
        return result


def prompt_logprobs(entries: list[dict[int, Logprob] | None] | None) -> list | None:
    """vLLM's form: {token id: {logprob, rank, decoded_token}} for every token of the prompt."""
    if entries is None:
        return None
    return [
        entry
        and {
            str(token): {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.decoded}
            for token, one in entry.items()
        }
        for entry in entries
    ]
