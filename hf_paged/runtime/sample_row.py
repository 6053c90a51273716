"""What the sampler is asked, row by row, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..base.sampling_params import SamplingParams
from ..base.types import Logprob
from .constraint import Constraint


@dataclass(slots=True, eq=False, weakref_slot=True)
class SampleRow:
    """One row to sample. It may live as long as its sequence: `token_ids` is read anew at every step.

    Attributes:
        token_ids: prompt and output so far, without padding.
        num_prompt: how many of them are the prompt.
        seed: 64-bit; with the number of output tokens it fixes the draw.
        pending: if one more output token follows that the host does not know yet, the row of the step before that
            sampled it; else None.
        eos_token_ids: forbidden, with the stop tokens, until `min_tokens` (unless `ignore_eos`).
        bad_words_ids: token sequences of `bad_words`.
        constraint: the form of the output; this sequence's own.
        processors: `(token_ids: list[int], logits [V] fp32) -> logits [V]`, called in order on a copy of the row.
        use_torch_rng: draw with `torch.multinomial` on probabilities [1, V] from torch's default generator.
        capture: keep raw and processed logits.
        base: the row that this one is an extension of, for guesses; else None.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt: int
    seed: int
    eos_token_ids: frozenset[int] = frozenset()
    bad_words_ids: list[list[int]] = field(default_factory=list)
    constraint: Constraint | None = None
    processors: tuple[Callable, ...] = ()
    use_torch_rng: bool = False
    capture: bool = False
    pending: int | None = None
    base: SampleRow | None = None

    @property
    def num_output(self) -> int:
        """Output tokens so far, a pending one included."""
        return len(self.token_ids) - self.num_prompt + (self.pending is not None)

    @property
    def hosted(self) -> bool:
        """Whether the host has a hand in choosing the token: a form, code of the user's, torch's generator, kept logits."""
        return self.constraint is not None or bool(self.processors) or self.use_torch_rng or self.capture

    @property
    def has_history_rules(self) -> bool:
        """Whether penalties look at the tokens so far."""
        params = self.params
        return params.repetition_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)

    @property
    def greedy(self) -> bool:
        return self.params.temperature == 0.0

    def extended(self, token_ids: Sequence[int]) -> SampleRow:
        """The row as it would be with `token_ids` appended to the output."""
        return replace(self, token_ids=[*self.token_ids, *token_ids], base=self.base or self)

    @property
    def guesses(self) -> Sequence[int]:
        """What `extended` appended."""
        return () if self.base is None else self.token_ids[len(self.base.token_ids) :]


@dataclass(slots=True)
class SampleResult:
    """One entry per row in every list.

    Attributes:
        tokens: the token, or -1 where the row has an error.
        logprobs: from the raw logits (before rules and warpers), chosen token first; None where not asked for.
        errors: why a row has no token.
        raw_logits, processed_logits: fp32 [V] copies of rows with `capture`; greedy rows are processed without warpers.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob] | None]
    errors: list[Exception | None]
    raw_logits: list[torch.Tensor | None]
    processed_logits: list[torch.Tensor | None]
