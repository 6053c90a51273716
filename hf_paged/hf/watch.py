"""What decides a model's outputs, as one look sees it: weights, buffers, modules, adapters and hooks."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager

import torch
from torch.nn.modules import module as torch_module

from .weights import local

FINGERPRINT_SAMPLES = 16  # values looked at in each tensor, at least

# Hooks that transformers and PEFT leave on modules and that never change an activation: recorders of hidden states
# (idle unless asked for), and what makes embeddings require a gradient for gradient checkpointing.
_HARMLESS = frozenset({"output_capturing_hook", "make_inputs_require_grads", "make_inputs_require_grad"})


class Snapshot:
    """A model as it was when this object was made.

    Attributes:
        modules: its modules.
        hooked: places among them of those with a forward hook of the user's; -1 for one on all modules.
    """

    def __init__(self, model: torch.nn.Module):
        modules = self.modules = list(model.modules())
        self._tensors = [
            (tensors, name, tensor, memory, _counted(memory), memory.data_ptr())
            for module in modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
            for memory in memory_of(tensor)
        ]
        # Writes into a sharded parameter count there, not in its local part.
        self._sharded = [(tensor, tensor._version) for _, _, tensor, *_ in self._tensors if local(tensor) is not tensor]
        self._children = [(module._modules, dict(module._modules)) for module in modules if module._modules]
        self._attributes = [module.__dict__ for module in modules]
        self._around = self._around_forwards()
        self.hooked = [-1] if any(map(_of_user, _global_hooks())) else []
        self.hooked += [place for place, module in enumerate(modules) if any(map(_of_user, _hooks(module)))]
        self._adapters = [(module, adapter_state(module)) for module in modules if hasattr(module, "_active_adapter")]
        self._fingerprint = torch.cat([_sample(entry[3]) for entry in self._tensors])

    @property
    def device(self) -> torch.device:
        return self._tensors[0][2].device

    def holds(self) -> bool:
        """Whether the model is still like this, as far as a quick look tells: writes through `.data` escape it."""
        for tensors, name, tensor, memory, version, pointer in self._tensors:
            if tensors.get(name) is not tensor or memory.data_ptr() != pointer:
                return False
            if version is not None and memory._version != version:
                return False
        return (
            self._around == self._around_forwards()
            and all(tensor._version == version for tensor, version in self._sharded)
            and all(now == then for now, then in self._children)
            and all(adapter_state(module) == then for module, then in self._adapters)
        )

    def equals(self, later: Snapshot) -> bool:
        """Whether a few values of every parameter are the same in both."""
        return torch.equal(self._fingerprint, later._fingerprint)

    def same_places(self, later: Snapshot) -> bool:
        """Whether `later` differs in nothing but values written where they were before."""
        mine, theirs = (
            [(name, id(tensor), pointer) for _, name, tensor, *_, pointer in snapshot._tensors] for snapshot in (self, later)
        )
        return (
            mine == theirs
            and self._around == later._around
            and [then for _, then in self._children] == [then for _, then in later._children]
            and self._adapters == later._adapters
        )

    def replaced_forwards(self) -> list[str]:
        """Classes of the modules whose forward was replaced on the instance."""
        return [type(module).__name__ for module in self.modules if "forward" in module.__dict__]

    def _around_forwards(self) -> list[tuple]:
        """What runs around or instead of the classes' own forwards: hooks by id, and forwards set on instances."""
        around = [tuple(map(tuple, _global_hooks()))]
        around += [
            (place, tuple(own["_forward_pre_hooks"]), tuple(own["_forward_hooks"]), own.get("forward"))
            for place, own in enumerate(self._attributes)
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
        ]
        return around


def _hooks(module: torch.nn.Module) -> tuple[dict, dict]:
    return module._forward_pre_hooks, module._forward_hooks


def _global_hooks() -> tuple[dict, dict]:
    return torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks


def _of_user(hooks: dict) -> bool:
    """Whether any of these hooks may change what a module computes, or may want to see all of it."""
    return not all(map(_harmless, hooks.values()))


def only_recorders(module: torch.nn.Module) -> bool:
    """Whether all forward hooks of `module` are transformers' own that record what it returns, when asked to."""
    return not _of_user(module._forward_hooks)


def _harmless(hook) -> bool:
    home = getattr(hook, "__module__", None) or ""
    return getattr(hook, "__name__", "") in _HARMLESS and home.partition(".")[0] in ("transformers", "peft")


def hooked_modules(model: torch.nn.Module) -> list[str]:
    """Names of the modules that have a forward hook of the user's; "every module" for one on all there are."""
    everywhere = ["every module"] if any(map(_of_user, _global_hooks())) else []
    return everywhere + [
        name or type(model).__name__ for name, module in model.named_modules() if any(map(_of_user, _hooks(module)))
    ]


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether anything but the class's own forward runs when `module` is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or "forward" in module.__dict__
    )


@contextmanager
def without_hooks(model: torch.nn.Module):
    """No forward hook of the model's modules runs while inside, so that nobody sees a call that is not theirs."""
    modules = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    kept = [_hooks(module) for module in modules]
    for module in modules:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, (before, after) in zip(modules, kept):
            module._forward_pre_hooks, module._forward_hooks = before, after


def adapter_state(module) -> tuple:
    """What a PEFT layer currently adds to its base layer, as far as its parameters do not tell."""
    scaling = getattr(module, "scaling", None)
    return (
        module.active_adapters,
        module.disable_adapters,
        list(getattr(module, "merged_adapters", ())),
        dict(scaling) if isinstance(scaling, dict) else None,
    )


def _counted(tensor: torch.Tensor) -> int | None:
    """Writes in place so far; None of an inference tensor, which counts none."""
    return None if tensor.is_inference() else tensor._version


def version_of(tensor: torch.Tensor) -> int:
    """Counts writes in place."""
    return _counted(tensor) or 0


def memory_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors whose memory `tensor` stands for: itself; or those within it, for a tensor of a type that wraps others
    and has no memory of its own, such as the quantized weights of torchao and quanto."""
    own = local(tensor)
    if own is not tensor:
        return [own]
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [memory for name in names for memory in memory_of(getattr(tensor, name))]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A few values spread over the tensor, as float64 on its device."""
    flat = tensor.detach().flatten() if tensor.is_contiguous() else tensor.detach().reshape(-1)
    values = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)]
    return (values.view(torch.uint8) if values.element_size() == 1 else values).double()  # some bytes are no numbers
