"""Plans and settings as plain integers, in the order in which they are sent."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from ..base.config import EngineConfig
from ..core.plan import StepPlan


@dataclass(slots=True)
class StepMessage:
    """What a rank must know of a step that rank 0 runs.

    Attributes:
        plan: the step's plan as `encode_plan` gives it: its memory is to be grown and its blocks copied in any case.
        rows: packed rows whose logits are wanted.
        runs: whether the model runs. If not, the step failed before that.
        winners: whether each row's largest logit and its token are all that is wanted of the logits.
        num_sampled: how many tokens of the step before the plan's ids below 0 stand for; they follow as a tensor.
        position_ids: of every packed row, where they are not its place in its sequence; else empty.
        embeds_size: H, if embeddings [1, T, H] take the place of the token ids; they follow as a tensor. Else 0.
        graph_size: the number of sequences to which the step is padded, to run as a recorded forward; 0: as it is.
        records: whether that forward is to be recorded.
        hooked: where hooks of the user's watch the model; see `PagedModel.hooked`.
    """

    plan: np.ndarray
    rows: list[int] = field(default_factory=list)
    runs: bool = False
    winners: bool = False
    num_sampled: int = 0
    position_ids: list[int] = field(default_factory=list)
    embeds_size: int = 0
    graph_size: int = 0
    records: bool = False
    hooked: list[int] = field(default_factory=list)

    def encode(self) -> np.ndarray:
        flags = [self.runs, self.winners, self.num_sampled, self.embeds_size, self.graph_size, self.records]
        lists = [part for numbers in (self.rows, self.position_ids, self.hooked) for part in (len(numbers), *numbers)]
        return np.concatenate([np.array([*flags, *lists], dtype=np.int64), self.plan])

    @classmethod
    def decode(cls, numbers: np.ndarray) -> StepMessage:
        read = _Reader(numbers)
        runs, winners, num_sampled, embeds_size, graph_size, records = read.take(6)
        rows, position_ids, hooked = (read.take(read.one()) for _ in range(3))
        plan = numbers[read.place :]
        return cls(
            plan,
            rows=rows,
            runs=bool(runs),
            winners=bool(winners),
            num_sampled=num_sampled,
            position_ids=position_ids,
            embeds_size=embeds_size,
            graph_size=graph_size,
            records=bool(records),
            hooked=hooked,
        )


def encode_plan(plan: StepPlan) -> np.ndarray:
    """int64 [n]; `decode_plan` is its inverse."""
    head = [plan.step, len(plan.seq_ids), len(plan.token_ids), len(plan.block_tables), len(plan.samples), plan.num_slots]
    tables = list(chain.from_iterable(plan.block_tables))
    parts: list[Iterable[int]] = [
        [*head, len(plan.states)],
        plan.seq_ids,
        plan.num_new,
        plan.num_drafts,
        plan.num_context,
        plan.token_ids,
        map(len, tables),
        chain.from_iterable(tables),
        map(len, plan.copies),
        chain.from_iterable(chain.from_iterable(plan.copies)),
        plan.num_blocks,
        chain.from_iterable(plan.states),
        chain.from_iterable(plan.samples),
    ]
    return np.fromiter(chain.from_iterable(parts), np.int64)


def decode_plan(numbers: np.ndarray) -> StepPlan:
    read = _Reader(numbers)
    step, num_seqs, num_tokens, num_groups, num_samples, num_slots, num_states = read.take(7)
    seq_ids, num_new, num_drafts, num_context = (read.take(num_seqs) for _ in range(4))
    token_ids = read.take(num_tokens)
    lengths = read.take(num_groups * num_seqs)
    tables = [read.take(length) for length in lengths]
    counts = read.take(num_groups)
    return StepPlan(
        step=step,
        seq_ids=seq_ids,
        num_new=num_new,
        num_drafts=num_drafts,
        num_context=num_context,
        token_ids=token_ids,
        block_tables=[tables[group * num_seqs : (group + 1) * num_seqs] for group in range(num_groups)],
        copies=[read.pairs(count) for count in counts],
        num_blocks=read.take(num_groups),
        states=read.pairs(num_states),
        num_slots=num_slots,
        samples=read.pairs(num_samples),
    )


def encode_moves(num_blocks: list[int], moves: list[dict[int, int]]) -> np.ndarray:
    """The arguments of `KVCache.resize`; `decode_moves` is its inverse."""
    pairs = [[len(moved), *chain.from_iterable(moved.items())] for moved in moves]
    return np.fromiter(chain([len(num_blocks)], num_blocks, *pairs), np.int64)


def decode_moves(numbers: np.ndarray) -> tuple[list[int], list[dict[int, int]]]:
    read = _Reader(numbers)
    num_blocks = read.take(read.one())
    return num_blocks, [dict(read.pairs(read.one())) for _ in num_blocks]


def encode_config(config: EngineConfig, max_model_len: int) -> np.ndarray:
    """An engine's configuration and its length in tokens, for `decode_config`, without what only rank 0 looks at."""
    fields = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in ("images", "speculation")
    }
    text = json.dumps([fields, max_model_len])
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


def decode_config(numbers: np.ndarray) -> tuple[EngineConfig, int]:
    fields, max_model_len = json.loads(numbers.astype(np.uint8).tobytes())
    return EngineConfig(**fields), max_model_len


class _Reader:
    def __init__(self, numbers: np.ndarray):
        self._numbers = numbers
        self.place = 0

    def take(self, count: int) -> list[int]:
        start, self.place = self.place, self.place + count
        return self._numbers[start : self.place].tolist()

    def one(self) -> int:
        return self.take(1)[0]

    def pairs(self, count: int) -> list[tuple[int, int]]:
        flat = self.take(2 * count)
        return list(zip(flat[::2], flat[1::2], strict=True))
