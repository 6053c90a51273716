"""PEFT's own modules while a forward runs: silenced where they are in the model, put into it where they are not."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import contextmanager

from torch import nn

from ...base.errors import UnsupportedOption
from .loading import innermost
from .targets import concerns

MERGED = "adapter: {} is merged into the model, below any other; unmerge it first"


def tuners_of(modules: list[nn.Module]) -> list[nn.Module]:
    """PEFT's modules among these: layers with adapters, and what stands for layers that are saved with them."""
    return [module for module in modules if hasattr(type(module), "adapter_layer_names")]


def merged_in(tuners: list[nn.Module]) -> list[str]:
    """Adapters that are merged into the model's weights."""
    return sorted({name for module in tuners for name in getattr(module, "merged_adapters", ())})


@contextmanager
def set_in(tuners: list[nn.Module], active: str | None):
    """While inside, of all adapters in these modules only `active` acts; None: none does.

    Raises UnsupportedOption if one is merged: its effect is in the weights.
    """
    if merged := merged_in(tuners):
        raise UnsupportedOption(MERGED.format(", ".join(merged)))
    before = [(module, module._disable_adapters, module._active_adapter) for module in tuners]
    try:
        for module in tuners:
            module._disable_adapters = active is None
            if active is not None:
                module._active_adapter = [active] if concerns(module, active) else []
        yield
    finally:
        for module, disabled, names in before:
            module._disable_adapters, module._active_adapter = disabled, names


class Overlay:
    """PEFT's modules of one adapter, around the layers of a model they were not made for.

    Args:
        base: the model they are in: a copy of `model`'s structure.
        name: of the adapter.
        changed: layers of the base whose own parameters came with the adapter, and stay.
    """

    def __init__(self, base: nn.Module, name: str, model: nn.Module, changed: Collection[str] = ()):
        self._modules: list[tuple[str, nn.Module]] = []
        layers = dict(model.named_modules())
        for path, module in base.named_modules():
            if concerns(module, name):
                inner = "base_layer" if "base_layer" in module._modules else "original_module"
                assert innermost(module) is module._modules[inner], "one adapter, one wrapper"
                if path not in changed:
                    module._modules[inner] = innermost(layers[path])
                self._modules.append((path, module))
            elif path in changed:
                self._modules.append((path, module))

    @property
    def modules(self) -> list[nn.Module]:
        return [module for _, module in self._modules]

    @property
    def num_bytes(self) -> int:
        """Of the adapter's own weights."""
        return sum(
            parameter.nbytes
            for module in self.modules
            for path, parameter in module.named_parameters()
            if path.partition(".")[0] not in ("base_layer", "original_module")
        )

    @contextmanager
    def over(self, model: nn.Module):
        """While inside, the modules are in `model`."""
        before = []
        try:
            for path, module in self._modules:
                parent_path, _, child = path.rpartition(".")
                siblings = model.get_submodule(parent_path)._modules
                before.append((siblings, child, siblings[child]))
                siblings[child] = module
            yield
        finally:
            for siblings, child, own in reversed(before):
                siblings[child] = own
