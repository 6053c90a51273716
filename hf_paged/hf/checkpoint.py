"""What a checkpoint's files hold, under the model's own names, before anything is loaded."""

from __future__ import annotations

import ctypes
import mmap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

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
    from transformers.core_model_loading import WeightRenaming, rename_source_key
    from transformers.modeling_utils import load_state_dict

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    modules = {name for name, _ in model.named_modules()}
    checkpoint = Checkpoint()
    for file in files:
        try:
            tensors = load_state_dict(file, map_location="meta")
        except Exception as error:
            raise InvalidArgument(f"{file} cannot be read: {error}") from error
        for key, tensor in tensors.items():
            module, _, name = rename_source_key(key, renamings, [])[0].rpartition(".")
            module = _own_name(module, modules, model.base_model_prefix)
            checkpoint.layers[module][name] = tensor
            checkpoint.names[module] = key.rpartition(".")[0]
    return checkpoint


def give_back(tensors: Iterable[Tensor], module: nn.Module) -> None:
    """Give back the memory of contiguous tensors that nobody but `module` looks at again, and that it does not keep, where
    the system allows it.

    Safetensors maps a file as a whole, and its pages, once read, stay with the process as long as any tensor of the
    file is there. Without this a model that is packed layer by layer would hold the checkpoint twice at the end.
    """
    kept = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}
    forget_pages(
        *(tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() not in kept)
    )
    trim()


def trim() -> None:
    """Give back what has been freed, which glibc keeps where its neighbours are in use or another thread allocated it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def forget_pages(*tensors: Tensor) -> None:
    """Give back the memory of contiguous tensors, which nobody has written to if it is a file's."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    spans: list[list[int]] = []
    for start, end in sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors):
        if spans and start <= spans[-1][1]:  # small ones that follow each other have pages together
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([start, end])
    for start, end in spans:
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # the first and the last page are others', too
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _own_name(module: str, modules: set[str], prefix: str) -> str:
    """The model's name of a module that may be stored with or without the base model's prefix."""

    def known(name: str) -> bool:
        experts, one_of_them, _ = name.partition(".experts.")  # they may be one module in the model
        return name in modules or bool(one_of_them) and f"{experts}.experts" in modules

    if known(f"{prefix}.{module}"):
        return f"{prefix}.{module}"
    bare = module.removeprefix(f"{prefix}.")
    return bare if not known(module) and known(bare) else module
