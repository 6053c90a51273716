"""What a rank other than 0 does: it has a cache of its own heads, and runs on it what rank 0's engine runs."""

from __future__ import annotations

import numpy as np
import torch

from ..base.errors import ParallelError
from ..parallel.encoding import StepMessage, decode_config, decode_moves, decode_plan
from ..parallel.team import Order, Team
from ..runtime.leading import FollowingRunner
from ..runtime.runner import PagedModel
from .build import build, build_runner


class Follower:
    """Obeys the orders of rank 0 for one model.

    Attributes:
        stopped: whether rank 0 has given its last order.
    """

    def __init__(self, model: PagedModel, team: Team):
        self.stopped = False
        self._model, self._team = model, team
        self._runner: FollowingRunner | None = None

    def until(self, *last: Order) -> tuple[Order, np.ndarray]:
        """Obey up to an order that is one of `last`, which is the caller's to obey, or to the very last.

        Raises ParallelError if a rank, this one included, died, hung or failed.
        """
        while not self.stopped:
            order, numbers = self._team.receive()
            self.stopped = order is Order.STOP
            if self.stopped or order in last:
                return order, numbers
            with self._team.together(order.name.lower()):
                self._obey(order, numbers)
        return Order.STOP, np.empty(0, dtype=np.int64)

    def _obey(self, order: Order, numbers: np.ndarray) -> None:
        if order is Order.OPEN:
            self._open(*decode_config(numbers))
        elif order is Order.CLOSE:
            self._runner = None
        elif self._runner is None:
            raise ParallelError(f"rank {self._team.rank} has no cache for {order.name}")
        elif order is Order.STEP:
            self._step(StepMessage.decode(numbers))
        elif order is Order.RESIZE:
            self._runner.resize(*decode_moves(numbers))
        elif order is Order.RESERVE:
            *num_blocks, num_slots = decode_moves(numbers)[0]
            self._runner.reserve(num_blocks, num_slots)
        elif order is Order.RELEASE:
            self._runner.release()

    def _open(self, config, max_model_len: int) -> None:
        """The first half of what makes rank 0's engine, of which only the runner is needed here."""
        cache, scheduler = build(self._model, config, max_model_len)
        self._runner = build_runner(self._model, config, cache, scheduler, FollowingRunner)

    def _step(self, message: StepMessage) -> None:
        model, plan, device = self._model, decode_plan(message.plan), self._model.device
        sampled, options = None, {}
        if message.num_sampled:
            sampled = self._team.share(torch.empty(message.num_sampled, dtype=torch.int64, device=device))
        if message.embeds_size:
            embeds = torch.empty(1, plan.num_tokens, message.embeds_size, dtype=model.dtype, device=device)
            options["inputs_embeds"] = self._team.share(embeds)
        model.weights_changed()  # what moved is found again; what that means for cached prefixes is for rank 0 to say
        context = self._runner.take(message, plan, sampled)
        if message.position_ids:
            context.position_ids = torch.tensor([message.position_ids], dtype=torch.int64, device=device)
        if not message.runs:
            return
        if message.hooked != model.hooked:
            raise ParallelError(
                f"rank {self._team.rank} has forward hooks on other modules than rank 0: register them on all ranks alike"
            )
        if context.recording is not None:
            self._runner.replay(context, message)
        elif message.winners:
            self._runner.run(context, lambda context: model.winners(context, context.rows))
        else:
            self._runner.run(context, lambda context: model.outputs(context, context.rows, **options))
