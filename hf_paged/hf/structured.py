"""Outputs of a required form from `generate`, by any of its decoding methods: a logits processor for one call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from transformers import LogitsProcessor

from ..base.errors import InvalidArgument
from ..base.structured import StructuredOutputsParams
from ..runtime.constraint import Constraint, Constraints
from .spec import text_config


class StructuredOutputsProcessor(LogitsProcessor):
    """Lets `generate` choose only tokens after which an output can still have its form; for one call, of any model.

        form = StructuredOutputsProcessor({"json": schema}, tokenizer, model)
        model.generate(**inputs, num_beams=4, logits_processor=[form])

    Every beam has a state of its own, which follows it wherever the search takes it. On a patched model greedy search and
    sampling become requests of the engine with that form, unless other processors come beside it.

    Args:
        form: what SamplingParams takes as `structured_outputs`.
        tokenizer: a fast tokenizer of transformers.
        model: whose outputs they are.
        eos_token_id: the tokens that end an output; by default those of the model's generation config.

    Raises:
        InvalidArgument: the form is none, or too large, or cannot be had with this tokenizer; llguidance is missing.
    """

    def __init__(
        self,
        form: StructuredOutputsParams | dict,
        tokenizer,
        model,
        *,
        eos_token_id: int | Iterable[int] | None = None,
    ):
        self.form = StructuredOutputsParams.of(form)
        if eos_token_id is None:
            eos_token_id = getattr(model.generation_config, "eos_token_id", None)
        ids = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or ()
        self.eos_token_ids = frozenset(int(token) for token in ids)
        vocab_size = text_config(model).vocab_size
        self._constraint = Constraints(tokenizer, vocab_size).compile(self.form, self.eos_token_ids)
        self._start: int | None = None  # where outputs begin
        self._states: dict[tuple[int, ...], Constraint] = {}  # of the last call's outputs
        self._shown: set[tuple[int, ...]] = set()  # all outputs of the last call

    @property
    def used(self) -> bool:
        """Whether a call of `generate` has begun with it."""
        return self._start is not None

    def begin(self, width: int) -> Constraint:
        """The form, for an engine to follow; outputs begin after `width` columns."""
        self._start = width
        return self._constraint

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores` [B, V] with -inf for what may not follow `input_ids` [B, L]. Rows that have ended are left alone.

        Beams that nothing can save have -inf everywhere: there are fewer ways to go on than beams.
        """
        if self._start is None:
            self._start = input_ids.shape[1]
        outputs = [tuple(row[self._start :]) for row in input_ids.tolist()]
        alive = dict.fromkeys(output for output in outputs if self.eos_token_ids.isdisjoint(output))
        allowed = self._allowed(list(alive))
        if alive and not any(mask is not None for mask in allowed.values()):
            self._check_not_used_before(alive)
        self._shown = set(outputs)
        forbidden = torch.zeros(scores.shape, dtype=torch.bool)
        for row, output in enumerate(outputs):
            if output in alive:
                forbidden[row] = True
                if (mask := allowed[output]) is not None:
                    mask = mask[: scores.shape[1]]
                    forbidden[row, : len(mask)] = ~mask
        return scores.masked_fill(forbidden.to(scores.device), -torch.inf)

    def _allowed(self, outputs: list[tuple[int, ...]]) -> dict[tuple[int, ...], torch.Tensor | None]:
        """What may follow each output, bool [V]; None where nothing can. Their states are kept for the next call."""
        followers = defaultdict(list)
        for output in outputs:
            parent = output[:-1] if output[:-1] in self._states else self._nearest(output)
            followers[parent].append(output)
        states, allowed = {}, {}
        for parent, children in followers.items():
            first = self._states.get(parent) or self._constraint.fork()
            for output, state in zip(children, [first, *(first.fork() for _ in children[1:])], strict=True):
                allowed[output] = state.allowed(output, guessed=len(output))
                if allowed[output] is not None:
                    states[output] = state
        self._states = states
        return allowed

    def _nearest(self, output: tuple[int, ...]) -> tuple[int, ...] | None:
        """The state with most in common: candidates of assisted decoding are longer by some tokens, or taken back."""
        return max(self._states, key=lambda other: _num_common(other, output), default=None)

    def _check_not_used_before(self, outputs: Iterable[tuple[int, ...]]) -> None:
        if not any(output[:-1] in self._shown for output in outputs):
            raise InvalidArgument("logits_processor: a StructuredOutputsProcessor is good for one call of generate")


def _num_common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    for count, (one, other) in enumerate(zip(first, second)):
        if one != other:
            return count
    return min(len(first), len(second))
