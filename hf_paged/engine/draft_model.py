"""A smaller model as the source of guesses: it says what each request would sample if the draft model's logits counted.

The draft model runs in an engine of its own. Every sequence of the main engine has a row of held pages there, which
follows the sequence: tokens that were guessed wrong are taken back, tokens it has not seen are computed. Guesses are
sampled with the request's own rules and its own random numbers, so a draft model that agrees with the main one is right
for sampled requests as for greedy ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..base.errors import UnsupportedOption
from ..core.request import Sequence
from ..runtime.sampler import Sampler, SampleRow


@dataclass(slots=True)
class _Guest:
    """A sequence and its row.

    Attributes:
        agreed: leading tokens of the row known to be the sequence's.
        row: index among the held rows.
    """

    row: int
    agreed: int = 0


@dataclass(slots=True)
class _Job:
    sequence: Sequence
    sample_row: SampleRow
    count: int
    row: int
    guess: list[int]

    @property
    def feeds(self) -> list[int]:
        """What the next guess needs computed: the latest one; empty if there are enough."""
        return self.guess[-1:] if len(self.guess) < self.count else []


class DraftModel:
    """Guesses by a draft model. A `speculation.Proposer`.

    Args:
        engine: the draft model's BatchEngine. It may serve requests of its own meanwhile.
        num_rows: sequences to follow at a time; whoever was asked about least recently makes room for another.

    Raises UnsupportedOption for a model whose rows cannot take tokens back.
    """

    def __init__(self, engine, num_rows: int):
        if engine.has_state:
            raise UnsupportedOption("draft_model: its layers keep a state that cannot be taken back after a wrong guess")
        self._engine = engine
        self._rows = engine.hold(num_rows, name="draft", expendable=True)
        self._rows.keep_past = True
        self._sampler = Sampler(engine.model.device, engine.config.attention_backend)
        self._guests: dict[int, _Guest] = {}  # by seq_id, least recently asked about first
        self._free = list(range(num_rows))

    def propose(self, jobs: list[tuple[Sequence, SampleRow, int]]) -> list[list[int]]:
        """Guesses for every sequence, by as many batched forwards as the longest guess has tokens."""
        work = [self._job(*job) for job in jobs]
        try:
            ready = self._catch_up([job for job in work if job.count > 0])
            while ready:
                self._guess(ready)
                ready = [job for job in ready if job.feeds]
        except BaseException:  # nobody knows what the rows hold
            for sequence, _, _ in jobs:
                self.forget(sequence.seq_id)
            raise
        return [job.guess for job in work]

    def _job(self, sequence: Sequence, sample_row: SampleRow, count: int) -> _Job:
        guest = self._guests.pop(sequence.seq_id, None)
        if guest is None:
            if not self._free:
                self.forget(next(iter(self._guests)))
            guest = _Guest(self._free.pop())
            self._rows.renew(guest.row, cache_salt=sequence.request.cache_salt)
        self._guests[sequence.seq_id] = guest
        self._agree(guest, sequence.token_ids)
        room = self._engine.max_model_len - len(sequence.token_ids) + 1  # the last guess is not computed
        if sample_row.params.logprobs is not None:
            sample_row = replace(sample_row, params=replace(sample_row.params, logprobs=None))
        return _Job(sequence, sample_row, min(count, room), guest.row, [])

    def _agree(self, guest: _Guest, token_ids: list[int]) -> None:
        """Take back what the row holds and the sequence does not. The sequence's last token is always computed anew."""
        held = self._rows.token_ids(guest.row)
        most = min(len(held), len(token_ids) - 1)
        agreed = min(guest.agreed, most)
        if held[:agreed] != token_ids[:agreed]:  # somebody who lacked blocks emptied the row meanwhile
            agreed = 0
        while agreed < most and held[agreed] == token_ids[agreed]:
            agreed += 1
        if agreed < len(held):
            self._rows.truncate(guest.row, agreed)
        guest.agreed = agreed

    def _catch_up(self, jobs: list[_Job]) -> list[_Job]:
        """Compute what the rows lack and make the first guesses. Prompts beyond one batch go on next time.

        Returns the jobs that need more guesses.
        """
        budget = self._rows.max_batch_tokens
        tokens, ready = {}, []
        for job in jobs:
            row, known = job.row, job.sequence.token_ids
            if not self._rows.token_ids(row):
                self._rows.take_hit(row, known)
            length = len(self._rows.token_ids(row))
            tokens[row] = known[length : length + budget]
            budget -= len(tokens[row])
            if length + len(tokens[row]) == len(known):
                ready.append(job)
            self._guests[job.sequence.seq_id].agreed = length + len(tokens[row])
        self._rows.forget_past([job.row for job in jobs])
        self._sample(ready, self._forward(tokens))
        return [job for job in ready if job.feeds]

    def _guess(self, jobs: list[_Job]) -> None:
        """One more guess for every job."""
        self._sample(jobs, self._forward({job.row: job.feeds for job in jobs}))

    def _forward(self, tokens: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """Append tokens to rows; the logits [V] after the last of each."""
        chunks = self._rows.forward([tokens.get(row, []) for row in range(len(self._rows))])
        return {span.row: chunk.result[place] for chunk in chunks for place, span in enumerate(chunk.spans)}

    def _sample(self, jobs: list[_Job], logits: dict[int, torch.Tensor]) -> None:
        """Add to every job's guess what its request would sample from the draft model's logits."""
        if not jobs:
            return
        rows = [job.sample_row.extended(job.guess) for job in jobs]
        result = self._sampler.sample(torch.stack([logits[job.row] for job in jobs]), rows)
        for job, token, error in zip(jobs, result.tokens, result.errors, strict=True):
            if error is None:
                job.guess.append(token)
            else:
                job.count = len(job.guess)  # no numbers to choose by; what it has may still be right

    def forget(self, seq_id: int) -> None:
        guest = self._guests.pop(seq_id, None)
        if guest is not None:
            self._rows.renew(guest.row)
            self._free.append(guest.row)

    def sleep(self) -> None:
        for seq_id in list(self._guests):
            self.forget(seq_id)
        self._engine.sleep()

    def close(self) -> None:
        self._rows.close()
