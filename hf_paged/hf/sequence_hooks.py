"""Functions of single requests on activations: forward hooks for one step, each given the rows of its own request."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch

from ..base.errors import InvalidArgument
from ..runtime.batch import StepContext, active_context


@contextmanager
def sequence_hooks(model: torch.nn.Module, context: StepContext):
    """While inside, outputs of modules go through the functions in `context.hooks`.

    A function that raises, or answers with anything but a fitting replacement, sets its sequence's error there and
    changes nothing; no function of that sequence is called again in this step.
    """
    if not context.hooks.functions:
        yield
        return
    calls: dict[str, list[tuple[int, Callable]]] = defaultdict(list)
    for seq_id, functions in context.hooks.functions.items():
        for name, function in functions.items():
            calls[name].append((seq_id, function))
    modules = dict(model.named_modules())
    hooks = [_ModuleHook(context, name, calls[name]) for name in calls]
    handles = []
    try:
        for hook in hooks:
            module = modules.get(hook.name)
            if module is not None:
                hook.sees_logit_rows = context.logit_rows is not None and module is model.get_output_embeddings()
                handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
    for hook in hooks:
        if not hook.ran:
            hook.fail_all(InvalidArgument(f"forward_hooks: module {hook.name!r} did not run in this model's forward"))


class _ModuleHook:
    """The forward hook of one module: splits its output among the sequences that want to see it.

    Attributes:
        sees_logit_rows: the module is called with the rows whose logits are needed, not with all.
        ran: whether the module was called in this step.
    """

    def __init__(self, context: StepContext, name: str, calls: list[tuple[int, Callable]]):
        self.context = context
        self.name = name
        self.calls = calls
        self.sees_logit_rows = False
        self.ran = False

    def __call__(self, module, args, output):
        """The output with the replaced rows; None if there are none."""
        if active_context() is not self.context:  # another thread runs the same model
            return None
        self.ran = True
        states = self.context.states
        if states is not None and states.running is not None:
            self.fail_all(
                InvalidArgument(
                    f"forward_hooks: module {self.name!r} is part of {states.running!r}, which does not run on rows of "
                    "single requests; name that module instead"
                )
            )
            return None
        changed = None
        for seq_id, function in self.calls:
            if seq_id in self.context.hooks.errors:
                continue
            try:
                activation, rebuild = _first_tensor(output)
                lane = self._lane(activation)
                own, packed = self._rows(seq_id)
                replacement = self._replacement(function, lane[own], self.context.position_ids[0, packed].clone())
            except Exception as error:
                self._fail(seq_id, error)
                continue
            if replacement is not None:
                changed = activation.clone() if changed is None else changed
                self._lane(changed)[own] = replacement
        return None if changed is None else rebuild(changed)

    def fail_all(self, error: Exception) -> None:
        for seq_id, _ in self.calls:
            self._fail(seq_id, error)

    def _fail(self, seq_id: int, error: Exception) -> None:
        self.context.hooks.errors.setdefault(seq_id, error)

    def _lane(self, activation: torch.Tensor) -> torch.Tensor:
        """View [N, ...] of an activation [1, N, ...] or [N, ...], N being the rows this module sees."""
        rows = self.context.logit_rows if self.sees_logit_rows else self.context.input_ids[0]
        if activation.shape[:2] == (1, len(rows)):
            return activation[0]
        if activation.shape[:1] == (len(rows),):
            return activation
        raise InvalidArgument(
            f"forward_hooks: module {self.name!r} returned shape {list(activation.shape)}, which has no row for each "
            f"of the step's {len(rows)} tokens"
        )

    def _rows(self, seq_id: int) -> tuple[slice | torch.Tensor, slice | torch.Tensor]:
        """(where the rows of a sequence are in what the module returned, which packed rows they are)."""
        plan = self.context.plan
        place = plan.seq_ids.index(seq_id)
        start = sum(plan.num_new[:place])
        stop = start + plan.num_new[place]
        if not self.sees_logit_rows:
            return slice(start, stop), slice(start, stop)
        rows = self.context.logit_rows
        own = ((rows >= start) & (rows < stop)).nonzero()[:, 0]
        return own, rows[own]

    def _replacement(self, function: Callable, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """What `function` makes of `rows`, checked; None if it leaves them as they are."""
        if not len(rows):
            return None
        given = rows.clone()
        result = function(given, positions)
        if result is None:
            if not given._version:
                return None
            result = given  # changed in place
        if torch.is_tensor(result) and (result.shape, result.dtype, result.device) == (
            rows.shape,
            rows.dtype,
            rows.device,
        ):
            return result
        what = f"{list(result.shape)} {result.dtype}" if torch.is_tensor(result) else type(result).__name__
        raise InvalidArgument(
            f"forward_hooks: the function on {self.name!r} returned {what}; it must return None or a tensor "
            f"{list(rows.shape)} {rows.dtype} on {rows.device}"
        )


def _first_tensor(output) -> tuple[torch.Tensor, Callable]:
    """(the first tensor of a module's output, a function that makes the output again with another in its place)."""
    if torch.is_tensor(output):
        return output, lambda tensor: tensor
    items: Iterable = ()
    if isinstance(output, dict):
        items = output.items()
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    for key, value in items:
        if torch.is_tensor(value):
            return value, lambda tensor: _with_item(output, key, tensor)
    raise InvalidArgument(f"forward_hooks: a module returned {type(output).__name__}, which has no tensor")


def _with_item(output, key, tensor: torch.Tensor):
    if isinstance(output, dict):
        changed = copy.copy(output)
        changed[key] = tensor
        return changed
    items = list(output)
    items[key] = tensor
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
