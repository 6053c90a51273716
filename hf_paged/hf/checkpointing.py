"""Gradient checkpointing of a forward on pages: what the backward pass computes again runs on pages, too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager

from torch import nn

from ..runtime.batch import StepContext, active_context

_FUNCTION = "_gradient_checkpointing_func"


def checkpointed_modules(modules: list[nn.Module]) -> list[nn.Module]:
    """Those that transformers would checkpoint, or whose parts, in a forward that knows its gradient."""
    return [m for m in modules if m.training and getattr(m, "gradient_checkpointing", False) and hasattr(m, _FUNCTION)]


@contextmanager
def recomputed_on_pages(modules: list[nn.Module], context: StepContext, on_pages: Callable):
    """While inside, `modules`, which everything else tells to be in eval mode, are checkpointed as in training.

    Args:
        on_pages: `on_pages(context, module)` is the scope in which a module runs on the pages of `context`.
    """
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_checkpointed(module, context, on_pages))
        yield


@contextmanager
def _checkpointed(module: nn.Module, context: StepContext, on_pages: Callable):
    function = getattr(module, _FUNCTION)

    def checkpoint(run: Callable, *args, **options):
        calls = context.calls.copy()

        def run_on_pages(*args, **kwargs):
            if active_context() is context:  # the forward itself
                module.training = False
                try:
                    return run(*args, **kwargs)
                finally:
                    module.training = True
            with on_pages(context, module):
                context.calls.update(calls)
                try:
                    return run(*args, **kwargs)
                finally:
                    context.shared.clear()  # the next to be computed again is the layer before

        return function(run_on_pages, *args, **options)

    setattr(module, _FUNCTION, checkpoint)
    module.training = True
    try:
        yield
    finally:
        module.training = False
        setattr(module, _FUNCTION, function)
