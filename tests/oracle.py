"""A proposer for tests that knows what requests will say, and errs as often as it is told to."""

from __future__ import annotations

from random import Random


class Oracle:
    """Guesses the known output, each token wrong with probability 1 - `chance`.

    Args:
        known: (prompt, completion index) -> output tokens. An unknown sequence gets no guess.
        vocab_size: wrong tokens stay below it.
    """

    def __init__(self, known: dict[tuple[tuple[int, ...], int], list[int]], vocab_size: int, chance: float = 1.0):
        self.known, self.vocab_size, self.chance = known, vocab_size, chance
        self.random = Random(5)

    def propose(self, jobs):
        guesses = []
        for sequence, _, count in jobs:
            output = self.known.get((tuple(sequence.request.prompt_token_ids), sequence.index), [])
            guess = output[sequence.num_output : sequence.num_output + count]
            wrong = [self.random.random() > self.chance for _ in guess]
            guesses.append([(token + miss) % self.vocab_size for token, miss in zip(guess, wrong)])
        return guesses

    def forget(self, seq_id):
        pass

    def sleep(self):
        pass

    def close(self):
        pass


def consult(engine, outputs, chance: float = 1.0) -> None:
    """Let `engine` guess from the outputs that requests of the same prompts gave before."""
    known = {
        (tuple(output.prompt_token_ids), completion.index): list(completion.token_ids)
        for output in outputs
        for completion in output.outputs
    }
    engine._speculator._proposer = Oracle(known, engine.model.vocab_size, chance)
