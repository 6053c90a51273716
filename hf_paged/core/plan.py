"""What one step is to compute, as plain data that can be pickled and sent to other processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from .media import MediaRows


@dataclass(slots=True)
class TierMoves:
    """What moves between the device's blocks, host memory and a disk before a step: first all that leaves, then all that comes.

    Attributes:
        spilled: (group, host slot, key) of prefix blocks that give their slots up: to be written to the disk.
        read: (group, host slot, contents) of blocks that came from the disk.
        out: [group] -> (block, host slot) to copy to the host.
        back: [group] -> (host slot, block) to copy to the device.
        states_out: (state slot, host slot) to copy to the host.
        states_back: (host slot, state slot) to copy to the device.
        num_slots: [group] -> host slots there must be; they are as large as a block. It only grows.
        num_states: host slots there must be for states. It only grows.
    """

    spilled: list[tuple[int, int, bytes]]
    read: list[tuple[int, int, object]]
    out: list[list[tuple[int, int]]]
    back: list[list[tuple[int, int]]]
    states_out: list[tuple[int, int]]
    states_back: list[tuple[int, int]]
    num_slots: list[int]
    num_states: int


@dataclass(slots=True)
class StepPlan:
    """One forward pass over a packed batch, made by `Scheduler.schedule`.

    A sequence may carry draft tokens: guesses of what comes after its last known token, computed and sampled along with
    it. `Scheduler.commit` keeps those that turn out to be what is sampled.

    Sequences with one new token come first, then the longer prefill chunks. In each layer the order is: block copies (all
    of them before the first layer, and after the moves to and from host memory), then all new keys and values are written,
    then attention runs: sequences may read blocks that another sequence of the same plan fills. A layer that keeps a state reads the states of all
    sequences before it writes any of them.

    A plan may be made before anybody knows what the plan before it sampled. It refers to such tokens by their place
    among that plan's samples.

    The block tables are the scheduler's own lists: read only, valid until the next plan is made.

    Attributes:
        step: counts plans from 1.
        seq_ids: sequences that run.
        num_new: query tokens of each sequence, its draft tokens included.
        num_drafts: draft tokens of each sequence, the last ones of its new tokens.
        num_context: tokens of each sequence already in the cache.
        token_ids: the new tokens, packed; sum(num_new) of them. One below 0, -1 - i, stands for the token that entry i
            of the previous plan's `samples` gets.
        block_tables: [group][sequence] -> blocks covering num_context + num_new tokens; -1 where a sliding group
            gave the block back (no query of this step sees it).
        copies: [group] -> (source, destination) blocks to copy first. No destination is also a source.
        num_blocks: [group] -> blocks the cache tensors must have for this step. It only grows.
        states: (slot its state is read from, slot it is written to) of each sequence; -1 to read: it begins with an empty
            state. Empty if the model keeps no state.
        num_slots: slots the state tensors must have for this step. It only grows.
        samples: (packed row of the logits, seq_id) for every token to sample. A prompt with n > 1 has n on one row; a
            sequence with draft tokens has its last known token's row and those of the drafts, in a run.
        adapters: `Request.adapter` of each sequence; empty if it is 0 of all.
        media: the rows whose embeddings come from an encoder, instead of their tokens'.
        moves: what moves to and from host memory; None if nothing does.
    """

    step: int
    seq_ids: list[int]
    num_new: list[int]
    num_drafts: list[int]
    num_context: list[int]
    token_ids: list[int]
    block_tables: list[list[list[int]]]
    copies: list[list[tuple[int, int]]]
    num_blocks: list[int]
    states: list[tuple[int, int]]
    num_slots: int
    samples: list[tuple[int, int]]
    adapters: list[int] = field(default_factory=list)
    media: list[MediaRows] = field(default_factory=list)
    moves: TierMoves | None = None

    @property
    def num_tokens(self) -> int:
        """Query tokens of the step."""
        return len(self.token_ids)
