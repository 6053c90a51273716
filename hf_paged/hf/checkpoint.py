"""What a checkpoint's files hold, under the model's own names, before anything is loaded."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor

from ..base.errors import InvalidArgument


@dataclass
class Checkpoint:
    """Tensors of a checkpoint, on the meta device.

    Attributes:
        layers: module -> name after the module's ("weight") -> tensor.
        names: module -> what the checkpoint calls it.
    """

    layers: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    names: dict[str, str] = field(default_factory=dict)


def read(model, files: list[str]) -> Checkpoint:
    """Raises InvalidArgument naming a file that cannot be read."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.modeling_utils import load_state_dict

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    modules = {name for name, _ in model.named_modules()}
    checkpoint = Checkpoint()
    for file in files:
        try:
            tensors = load_state_dict(file, map_location="meta")
        except Exception as error:
            raise InvalidArgument(f"{file} cannot be read: {error}") from error
        for key, tensor in tensors.items():
            renamed, converted = rename_source_key(key, renamings, converters)
            if converted is None:
                module, _, name = renamed.rpartition(".")
                module = _own_name(module, modules, model.base_model_prefix)
                checkpoint.layers[module][name] = tensor
                checkpoint.names[module] = key.rpartition(".")[0]
    return checkpoint


def _own_name(module: str, modules: set[str], prefix: str) -> str:
    """The model's name of a module that may be stored with or without the base model's prefix."""
    if f"{prefix}.{module}" in modules:
        return f"{prefix}.{module}"
    bare = module.removeprefix(f"{prefix}.")
    return bare if module not in modules and bare in modules else module
