"""An adapter from a folder, loaded by PEFT onto a copy of the model's structure. The model itself is not touched.

The copy shares the model's weights, under parameters of its own, so that whatever PEFT does to parameters (freezing
them, replacing them by what the folder holds) stays in the copy.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path

import torch
from torch import nn

from ...base.errors import InvalidArgument, UnsupportedOption
from ...quant.packed import Packed
from ..watch import without_hooks

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Ways to begin training that leave the model's own weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ, ...) take a
# part out of them, so the adapter belongs to a changed model.
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
PROMPT_LEARNING = "it puts virtual tokens before the prompt, outside the model's layers"


def require_peft():
    """The package; raises UnsupportedOption if it is not installed."""
    try:
        import peft
    except ImportError:
        raise UnsupportedOption("adapter: loading adapters needs PEFT: pip install peft") from None
    return peft


def load_folder(model: nn.Module, folder: Path, name: str, max_rank: int | None):
    """The adapter in `folder` on a copy of `model`: a PeftModel in which it is called `name`, and the copy's parameters as
    they were before, by name.

    Raises InvalidArgument, UnsupportedOption: the folder does not hold an adapter of this model, or one that cannot be
    had beside others; the message says why.
    """
    peft = require_peft()
    config = read_config(folder, name)
    check_config(config, name, max_rank)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = False  # the weights are there
    weights = _read_weights(folder, name)
    base = structure_of(model)
    before = dict(base.named_parameters())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about training and merging
            wrapped = peft.PeftModel(base, config, adapter_name=name, low_cpu_mem_usage=True)
            result = peft.set_peft_model_state_dict(wrapped, weights, adapter_name=name, low_cpu_mem_usage=True)
    except (KeyError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise InvalidArgument(f"adapter {name!r} does not fit this model: {reason[:500]}") from error
    if result.unexpected_keys:
        raise InvalidArgument(
            f"adapter {name!r} does not fit this model, which has no place for {_some(result.unexpected_keys)}"
        )
    own = [*wrapped.named_parameters(), *wrapped.named_buffers()]
    if missing := [path for path, tensor in own if tensor.is_meta]:
        raise InvalidArgument(f"adapter {name!r}: {folder / WEIGHTS} lacks {_some(missing)}")
    wrapped.base_model._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=True)  # as from_pretrained does
    wrapped.eval().requires_grad_(False)
    return wrapped, before


def read_config(folder: Path, name: str):
    """The PEFT configuration in `folder`; nothing in it is ignored."""
    peft = require_peft()
    path = folder / CONFIG
    if not path.is_file():
        raise InvalidArgument(f"adapter {name!r}: there is no {path}")
    try:
        values = json.loads(path.read_text())
        kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[values["peft_type"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InvalidArgument(f"adapter {name!r}: {path} is not the configuration of an adapter: {error!r}") from error
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(key for key, value in values.items() if key not in known and value):
        raise UnsupportedOption(f"adapter {name!r}: this PEFT knows no {_some(unknown)} of {values['peft_type']}")
    try:
        return kind(**{key: value for key, value in values.items() if key in known} | {"inference_mode": True})
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"adapter {name!r}: {path}: {error}") from error


def check_config(config, name: str, max_rank: int | None) -> None:
    """Raise UnsupportedOption for what no forward can have beside others, InvalidArgument for too high a rank."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UnsupportedOption(f"adapter {name!r}: {kind} cannot run beside others: {PROMPT_LEARNING}")
    if kind != "LORA":
        return
    begin = config.init_lora_weights
    if isinstance(begin, str) and begin.lower() not in HARMLESS_INITS:
        raise UnsupportedOption(
            f"adapter {name!r}: init_lora_weights={begin!r} changes the model's own weights; save it again with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    for option in ("layer_replication", "alora_invocation_tokens", "arrow_config"):
        if getattr(config, option, None):
            raise UnsupportedOption(f"adapter {name!r}: {option} cannot be had beside other adapters")
    ranks = [config.r, *config.rank_pattern.values()]
    if max_rank is not None and max(ranks) > max_rank:
        raise InvalidArgument(f"adapter {name!r} has rank {max(ranks)}, above max_rank {max_rank}")


def _read_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLE).exists():
            raise UnsupportedOption(
                f"adapter {name!r}: {folder / PICKLE} is a pickle, which can run programs; save it as {WEIGHTS}"
            )
        raise InvalidArgument(f"adapter {name!r}: there is no {path}")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidArgument(f"adapter {name!r}: {path} cannot be read: {error}") from error
    if bad := [key for key, tensor in weights.items() if not tensor.float().isfinite().all()]:
        raise InvalidArgument(f"adapter {name!r}: {path} holds infinities or NaN in {_some(bad)}")
    return weights


def structure_of(model: nn.Module, *, plain: bool = True) -> nn.Module:
    """A copy of `model` as it was before it was patched, sharing its weights. `plain`: without PEFT's modules, too."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                same = type(parameter) is not nn.Parameter  # of a type that does more than hold values
                memo[id(parameter)] = parameter if same else nn.Parameter(parameter.data, requires_grad=False)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = buffer
        if isinstance(module, Packed):
            memo[id(module._weight)] = module._weight
    with without_hooks(model):
        base = copy.deepcopy(model, memo)
    if not plain:
        return base
    for module in list(base.modules()):
        for child, inner in list(module._modules.items()):
            if inner is not None and innermost(inner) is not inner:
                module._modules[child] = innermost(inner)
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(leftover, None)
    return base


def innermost(module: nn.Module) -> nn.Module:
    """The model's own layer inside PEFT's wrappers; any other module is returned as it is."""
    while True:
        inner = module._modules.get("base_layer") or module._modules.get("original_module")
        if inner is None:
            return module
        module = inner


def _some(names: list[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
