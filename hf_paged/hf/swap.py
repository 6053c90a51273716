"""Swapping the class of a live module for a subclass of it, and back.

A swapped module keeps its parameters, hooks and identity. Copies and pickles of it are plain: they are made as the
class it had before, so nothing of hf_paged travels with a model that is deep-copied, pickled or saved.
"""

from __future__ import annotations

import copyreg
import functools
from contextlib import contextmanager
from contextvars import ContextVar

import torch

ATTRIBUTE = "_hf_paged"
SHARD = "_hf_paged_shard"  # what a sharded module knows; see fusion/sharded.py


def reduce_plain(module: torch.nn.Module):
    """For `__reduce_ex__`: the module as it was before hf_paged had it, whatever was swapped since."""
    state, kind = dict(module.__dict__), type(module)
    state.pop(ATTRIBUTE, None)
    shard = state.pop(SHARD, None)
    if shard is not None:
        state["forward"] = shard.forward
    while "_hf_paged_base" in vars(kind):
        kind = kind._hf_paged_base
    return copyreg._reconstructor, (kind, object, None), state


class Swapped:
    """Mixin of every swapped class. `_hf_paged` on the instance holds what the mixin needs to know."""

    _hf_paged_base: type

    def __reduce_ex__(self, protocol):
        return reduce_plain(self)


@functools.cache
def swapped_class(mixin: type, base: type) -> type:
    """A class with `mixin`'s methods over `base`'s, under `base`'s own name."""
    namespace = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), {**namespace, "_hf_paged_base": base})


def can_swap(module: torch.nn.Module) -> bool:
    """False for modules already swapped and those whose forward was replaced on the instance (accelerate's hooks)."""
    return not isinstance(module, Swapped) and "forward" not in module.__dict__


def swap(module: torch.nn.Module, mixin: type, state) -> None:
    module.__class__ = swapped_class(mixin, type(module))
    module.__dict__[ATTRIBUTE] = state


def restore(module: torch.nn.Module) -> None:
    if isinstance(module, Swapped):
        module.__class__ = module._hf_paged_base
        del module.__dict__[ATTRIBUTE]


@contextmanager
def evaluating(model: torch.nn.Module, modules: list[torch.nn.Module] | None = None):
    """Every module in eval mode while inside; afterwards each is as it was.

    `modules`: those of the model, if they are at hand. They may differ: PEFT puts layers in train mode into a model that
    is not.
    """
    training = [module for module in (model.modules() if modules is None else modules) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


_own: ContextVar[bool] = ContextVar("hf_paged_own_forwards", default=False)


@contextmanager
def own_forwards():
    """While inside, a call of a patched model is its own forward, also in exact mode."""
    token = _own.set(True)
    try:
        yield
    finally:
        _own.reset(token)


def are_own() -> bool:
    """Whether this is inside `own_forwards`."""
    return _own.get()
