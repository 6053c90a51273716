"""Adapters as the runtime sees them: each request may have one, which changes what layers make of its rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from torch import Tensor

from ..base.types import AdapterInfo
from ..core.plan import StepPlan


class StepAdapters(Protocol):
    """The adapters of one forward's rows."""

    def take_logit_rows(self, rows: Tensor | None) -> None:
        """The packed rows [R] that the output embedding will be given; None: all."""
        ...

    def changed(self, layer: object, x: Tensor, y: Tensor) -> Tensor:
        """What the rows' adapters make of y, which `layer` made of x. y may be written to.

        `layer` is a module; or whatever stands for several that are computed as one.
        """
        ...


class Adapters(Protocol):
    """The adapters of one model, by the numbers that requests know them by (`core.request.Request.adapter`)."""

    @property
    def infos(self) -> dict[str, AdapterInfo]:
        """Those that are loaded, by name."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory they take beside the model."""
        ...

    def number(self, name: str | None) -> int:
        """What a request of this adapter is told; None: of none. Raises InvalidArgument for one that is not loaded."""
        ...

    def changes_images(self, number: int) -> bool:
        """Whether requests told this number would want images encoded otherwise than others."""
        ...

    def is_loaded(self, number: int) -> bool:
        """Whether requests told this number can run."""
        ...

    def read(self, name: str, source: object, adapter_name: str | None, max_rank: int | None) -> object:
        """An adapter for `PagedModel.take_adapter`; may run beside steps. Raises InvalidArgument if it does not fit."""
        ...

    def remove(self, name: str) -> None:
        """Forget an adapter that no request has."""
        ...

    def close(self) -> None:
        """Forget all of them."""
        ...

    def group(self, adapter: int) -> Hashable:
        """Requests whose adapters are of the same group may run in one forward."""
        ...

    def for_forward(self, plan: StepPlan) -> StepAdapters | None:
        """What a forward of `plan`, whose adapters are all of one group, runs with; None if it needs nothing."""
        ...

    @property
    def generation(self) -> int:
        """Counts changes after which a forward that was recorded with adapters refers to what is not there any more."""
        ...

    def why_unrecordable(self, plan: StepPlan) -> str | None:
        """Why no recorded forward can run `plan` with its adapters; None if one can."""
        ...

    def for_recorded(self, plan: StepPlan, rows: Sequence[int], size: int) -> StepAdapters:
        """`for_forward` for a recorded forward of `size` sequences of one token, in buffers that do not move.

        Args:
            rows: packed rows whose logits are wanted.
        """
        ...


def groups_of(adapters: Adapters, plan: StepPlan) -> list[list[int]]:
    """The places of the plan's sequences, those that may run in one forward together."""
    groups: dict[Hashable, list[int]] = {}
    for place, adapter in enumerate(plan.adapters):
        groups.setdefault(adapters.group(adapter), []).append(place)
    return list(groups.values())


def part_of(plan: StepPlan, places: list[int], *, with_copies: bool) -> tuple[StepPlan, list[int]]:
    """(a plan of some of a plan's sequences alone, which packed rows of the whole its own rows are).

    Args:
        with_copies: whether it is the first of the parts, with which blocks are copied.
    """
    starts, start = [], 0
    for count in plan.num_new:
        starts.append(start)
        start += count
    rows = [row for place in places for row in range(starts[place], starts[place] + plan.num_new[place])]
    where = {row: index for index, row in enumerate(rows)}
    some = lambda values: [values[place] for place in places]  # noqa: E731
    part = StepPlan(
        step=plan.step,
        seq_ids=some(plan.seq_ids),
        num_new=some(plan.num_new),
        num_drafts=some(plan.num_drafts),
        num_context=some(plan.num_context),
        token_ids=[plan.token_ids[row] for row in rows],
        block_tables=[some(tables) for tables in plan.block_tables],
        copies=plan.copies if with_copies else [[] for _ in plan.copies],
        num_blocks=plan.num_blocks,
        states=some(plan.states) if plan.states else [],
        num_slots=plan.num_slots,
        samples=[(where[row], seq_id) for row, seq_id in plan.samples if row in where],
        adapters=some(plan.adapters),
        media=[span._replace(row=where[span.row]) for span in plan.media if span.row in where],
        moves=plan.moves if with_copies else None,
    )
    return part, rows
