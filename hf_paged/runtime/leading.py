"""Runners of a sharded model: what that of rank 0 does, the other ranks are told to do, too, on runners of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..base.errors import UnsupportedOption
from ..core.plan import StepPlan
from ..parallel.encoding import StepMessage, encode_moves, encode_plan
from ..parallel.team import Order
from .batch import StepContext
from .runner import ModelRunner, PagedModel, T


class LeadingRunner(ModelRunner):
    """The ModelRunner of rank 0.

    The others learn of a step when its forward begins, at once with the plan; or, if it never does, before whatever comes
    next, for blocks may have been copied. From the beginning of a forward to its end nothing may fail on one rank alone:
    the others would wait in a sum that never comes. So what is raised there ends the team.
    """

    def __init__(self, model: PagedModel, *args, **options):
        super().__init__(model, *args, **options)
        self.team = model.team
        self._message: StepMessage | None = None  # of the step prepared last, until it was sent
        self._sampled: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None

    def prepare(
        self, plan, owner=None, hooks=None, *, rows=(), sampled=None, hidden=False, embeddings=(), shifts=None
    ) -> StepContext:
        assert not embeddings and shifts is None, "images on a sharded model"
        self._flush()
        self.team.check()
        context = super().prepare(plan, owner, hooks, rows=rows, sampled=sampled, hidden=hidden)
        pending = sampled is not None and min(plan.token_ids, default=0) < 0
        self._message = StepMessage(encode_plan(plan), list(rows), num_sampled=len(sampled) if pending else 0)
        self._sampled, self._positions = sampled, context.position_ids
        context.announce = self._announce
        return context

    @property
    def finds_winners(self) -> bool:
        return self.model.finds_winners

    def winners(self, context: StepContext) -> tuple[torch.Tensor, torch.Tensor]:
        self._message.winners = True
        if context.recording is None:
            return self.run(context, lambda context: self.model.winners(context, context.rows))
        return self.run(context, lambda context: self.model.winners_of(self._recorded(context)))

    def _recorded(self, context: StepContext, records: bool | None = None) -> torch.Tensor:
        message, (graphs, valid_for) = self._message, self._graphs(context.plan)
        message.graph_size, message.records = context.recording, graphs.lacks(context.recording, valid_for)
        with self.team.talking:  # while they record, the ranks talk
            self._announce(context, context.rows, None)
            return super()._recorded(context, message.records)

    def run(self, context: StepContext, execute: Callable[[StepContext], T]) -> T:
        with self.team.engaged():
            try:
                return super().run(context, execute)
            except BaseException as error:
                if self._message is not None:  # the others have not begun
                    raise
                raise self.team.broken("step", error) from error

    def resize(self, num_blocks, moves) -> None:
        self._tell(Order.RESIZE, encode_moves(num_blocks, moves))
        super().resize(num_blocks, moves)

    def reserve(self, num_blocks, num_slots) -> None:
        self._tell(Order.RESERVE, encode_moves([*num_blocks, num_slots], []))
        super().reserve(num_blocks, num_slots)

    def release(self) -> None:
        if not self.team.failed:  # else there is nobody to tell
            self._tell(Order.RELEASE)
        super().release()

    def _tell(self, order: Order, numbers=None) -> None:
        self._flush()
        self.team.send(order, numbers)

    def _flush(self) -> None:
        """Send the step prepared last, if that was not done: its forward never began."""
        message, self._message = self._message, None
        if message is not None:
            message.num_sampled = 0
            self.team.send(Order.STEP, message.encode())

    def _announce(self, context: StepContext, rows: torch.Tensor, embeds: torch.Tensor | None) -> None:
        """The model's forward begins, for the logits of the packed rows `rows`."""
        message = self._message
        message.runs, message.hooked = True, self.model.hooked
        if rows is not context.rows:
            message.rows = rows.tolist()
        if context.position_ids is not self._positions:
            message.position_ids = context.position_ids[0].tolist()
        if embeds is not None:
            if embeds.dtype != self.model.dtype:
                raise UnsupportedOption(f"inputs_embeds must be {self.model.dtype} for a sharded model, got {embeds.dtype}")
            message.embeds_size = embeds.shape[-1]
        self._message = None
        self.team.send(Order.STEP, message.encode())
        if message.num_sampled:
            self.team.share(self._sampled)
        if embeds is not None:
            self.team.share(embeds.contiguous())


class FollowingRunner(ModelRunner):
    """The ModelRunner of another rank: whether a forward is recorded, rank 0 says."""

    _size: int | None = None

    def take(self, message: StepMessage, plan: StepPlan, sampled: torch.Tensor | None) -> StepContext:
        """`prepare` for the step of a message."""
        self._size = message.graph_size or None
        return self.prepare(plan, rows=message.rows, sampled=sampled)

    def _recording(self, *_) -> int | None:
        return self._size

    def replay(self, context: StepContext, message: StepMessage) -> None:
        """The forward of a step whose forward is recorded, and what follows it."""
        finish = self.model.winners_of if message.winners else self.model.whole
        self.run(context, lambda context: finish(self._recorded(context, message.records)))
