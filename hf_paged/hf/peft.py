"""PEFT: models wrapped for adapters, and which adapters a packed batch gets right.

An adapter inside a layer is part of that layer's own forward, which is what runs here, so adapters that treat every
token by itself need nothing from us. Those that look at rows of a batch, or at a prompt of their own, are refused by
name. This module does without importing PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..base.errors import UnsupportedModel

# Packages below peft.tuners whose layers act on every token by itself; tests/cpu/test_peft.py compares each with stock.
BY_TOKEN = frozenset(
    """
    adalora adaption_prompt beft boft c3a deft delora fourierft frod glora gralora hira hra ia3 ln_tuning loha lokr lora
    miss oft osf peanut psoft pvera randlora road shira supertuning tinylora trainable_tokens unilora vblora vera waveft
    """.split()
)
_PER_ROW = ("adapter_names", "alora_offsets")  # what PEFT hands its layers, by hooks, with one entry per row of a batch


def is_wrapped(model) -> bool:
    """Whether `model` is a PeftModel (or PeftMixedModel) around a transformers model."""
    return isinstance(model, torch.nn.Module) and "base_model" in model._modules and hasattr(model, "peft_config")


def base_model(model):
    """The transformers model inside a PeftModel; any other object is returned as it is.

    Raises UnsupportedModel for prompt learning, whose effect lies in the wrapper and not in the model.
    """
    if not is_wrapped(model):
        return model
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise UnsupportedModel(
                f"model: its PEFT adapter {name!r} is {_value(config.peft_type)}, which puts virtual tokens before the "
                "prompt outside the model; patch model.get_base_model() instead, model.generate then runs on "
                "transformers' own path"
            )
    return model.get_base_model()


def obstacles(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """(option or adapter, why a packed batch would get it wrong) for everything of the kind that is on `model` now."""
    for name, module in model.named_modules():
        tuner = tuner_of(module)
        if tuner is not None and tuner not in BY_TOKEN:
            yield f"PEFT's {tuner}", f"the adapter of {name} has not been proven to treat every token by itself"
        for variant in getattr(module, "lora_variant", {}).values() if tuner else ():
            if "alora" in type(variant).__name__.lower():
                yield "alora_invocation_tokens", f"the adapter of {name} acts from a place of its own in every row"
        for hook in module._forward_pre_hooks.values():
            for option in _PER_ROW:
                if option in getattr(hook, "keywords", {}):
                    yield option, "it gives every row of a batch an adapter of its own"


def names_by_row(model: torch.nn.Module) -> list[str] | None:
    """The adapter of every row of the batch, where PEFT's `generate` was given `adapter_names`; else None."""
    if not hasattr(model, "peft_config"):
        return None
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if names := getattr(hook, "keywords", {}).get("adapter_names"):
                return list(names)
    return None


class NamesByRow:
    """The hooks that tell PEFT's layers in `model` whose adapter every row of a batch has."""

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self._taken: list[tuple[dict, int, object]] = []

    def take(self) -> None:
        """Out of the model."""
        for module in self._model.modules():
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if "adapter_names" in getattr(hook, "keywords", {})]:
                self._taken.append((hooks, key, hooks.pop(key)))

    def put_back(self) -> None:
        for hooks, key, hook in self._taken:
            hooks[key] = hook
        self._taken.clear()


def replaces_preparation(model: torch.nn.Module) -> bool:
    """Whether somebody decides on this very object what `generate` feeds its forward."""
    function = model.__dict__.get("prepare_inputs_for_generation")
    own = type(model).prepare_inputs_for_generation
    return function is not None and getattr(function, "__func__", function) is not own


def tuner_of(module: torch.nn.Module) -> str | None:
    """The package below peft.tuners that `module`'s class comes from, such as "lora"; None for everything else."""
    homes = (kind.__module__.split(".") for kind in type(module).__mro__)
    return next((home[2] for home in homes if home[:2] == ["peft", "tuners"] and len(home) > 3), None)


def _value(peft_type) -> str:
    return getattr(peft_type, "value", peft_type)
