"""Where a request goes on from: a prompt, and the beginning of an output of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .sampling_params import SamplingParams
from .types import Logprob


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """A prompt to go on from in the middle of its output: `Engine.fork` gives it, `add` takes it wherever it takes a prompt.

    The output of the new request begins with `output_token_ids`. They count as output in every way: for `max_tokens` and
    `min_tokens`, penalties, stop strings, the form of structured outputs, the draws of a seed. So what follows is what
    would follow if the request had sampled them itself.

    Attributes:
        prompt_token_ids: the prompt.
        output_token_ids: the first tokens of the output; none of them ends it.
        logprobs: of these tokens, as those of CompletionOutput; needed where the new request wants some.
        prompt: the prompt's text, if it was given as text.
        params: for requests that are given none.
        adapter, cache_salt: of the new requests, as in `add`.
        media: what the engine knows of the images in the prompt; None: there are none.
    """

    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int] = ()
    logprobs: Sequence[dict[int, Logprob]] | None = None
    prompt: str | None = None
    params: SamplingParams | None = None
    adapter: str | None = None
    cache_salt: str | bytes | None = None
    media: Any = None

    def __len__(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)
