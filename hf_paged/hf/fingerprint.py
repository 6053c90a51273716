"""What a model computes, in one digest: equal digests mean equal keys and values for equal tokens.

    sha256( sources of hf_paged | versions, processor and settings of torch | configuration
            | of every module: its class and the sources of that, its plain attributes, every byte of its tensors )

Every byte of the weights counts: a sample of them would not tell a fine-tune that changed few values from its base. SHA-256
takes a second for 1 to 2 GB on each of a few threads, once for an engine and where nobody waits for it.
What lies in a cache (its type, block size and layout) is for whoever stores blocks to add.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
import transformers

import hf_paged_kernels

from ..base.errors import UnsupportedOption
from .watch import adapter_state, hooked_modules, memory_of

_PLAIN = (str, int, float, bool, type(None))
# attributes that change nothing here; the last notes that transformers' own hooks have come, with a first forward
_PASSING = frozenset({"training", "name_or_path", "_output_capturing_hooks_installed"})
_UNSAID = frozenset({"_name_or_path", "transformers_version"})  # of a configuration: the same model from elsewhere
_THREADS = min(4, os.cpu_count() or 1)


def fingerprint(model: torch.nn.Module) -> str:
    """64 hexadecimal digits that name what `model` computes, in this process and any other. Reads all weights once.

    Raises what `begin_fingerprint` does.
    """
    return begin_fingerprint(model)()


def begin_fingerprint(model: torch.nn.Module) -> Callable[[], str]:
    """A function that gives the `fingerprint`: all but the weights is read now, while nobody runs the model.

    The function may be called by another thread while somebody does. If the weights change meanwhile, it names nothing.

    Raises UnsupportedOption if functions that were put into the model take part in what it computes (forward hooks,
    forwards replaced on a module), or if weights are not in memory: nobody could tell whether they are the same elsewhere.
    """
    replaced = [name for name, module in model.named_modules() if "forward" in vars(module)]
    for names, what in ((hooked_modules(model), "forward hooks"), (replaced, "a forward of its own")):
        if names:
            raise UnsupportedOption(f"{names[0] or 'the model'} has {what}, so that its weights do not tell what it computes")
    digest = hashlib.sha256()
    _add(digest, *_sources(), *_machine(model), *_config(model))
    places: dict[tuple, int] = {}
    distinct: list[torch.Tensor] = []
    for name, module in model.named_modules():
        _add(digest, name, *map(_class, type(module).__mro__), *_attributes(module))
        for key, tensor in _tensors(module):
            place = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
            if place not in places:
                places[place] = len(distinct)
                distinct.append(tensor)
            _add(digest, f"{key} {places[place]} {place[1:]}")

    def finish() -> str:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="hf_paged-fingerprint") as pool:
            _add(digest, *pool.map(_contents, distinct))
        return digest.hexdigest()

    return finish


def _add(digest, *parts: str) -> None:
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "big") + data)


@cache
def _sources() -> tuple[str, ...]:
    """Digests of our own sources, which a version does not tell in a working copy."""
    roots = [Path(__file__).parents[1], Path(hf_paged_kernels.__file__).parent]
    files = [file for root in roots for file in sorted(root.rglob("*")) if file.suffix in (".py", ".cpp", ".h")]
    return tuple(_of_file(str(file)) for file in files)


@cache
def _of_file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _machine(model: torch.nn.Module) -> Iterator[str]:
    """What else decides the last bits: versions, the processor, how torch multiplies."""
    device = next(model.parameters()).device
    yield f"torch {torch.__version__} transformers {transformers.__version__} {platform.machine()} {device.type}"
    yield f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
    yield f"{torch.get_float32_matmul_precision()} {torch.backends.mkldnn.enabled} {torch.are_deterministic_algorithms_enabled()}"
    if device.type == "cuda":
        import triton

        yield f"{torch.cuda.get_device_name(device)} {torch.version.cuda} {torch.version.hip} triton {triton.__version__}"


def _config(model: torch.nn.Module) -> Iterator[str]:
    config = {key: value for key, value in model.config.to_dict().items() if key not in _UNSAID}
    yield json.dumps(config, sort_keys=True, default=str)


@cache
def _class(kind: type) -> str:
    """A class by name and by the file it was written in, whosever it is."""
    try:
        file = inspect.getsourcefile(kind)
    except TypeError:  # built in
        file = None
    return f"{kind.__module__} {kind.__qualname__} {_of_file(file) if file and Path(file).is_file() else ''}"


def _attributes(module: torch.nn.Module) -> Iterator[str]:
    """Numbers and names that were set on a module: scales, epsilons, sizes; and what an adapter adds now."""
    for name, value in sorted(vars(module).items()):
        items = value if isinstance(value, (tuple, list)) else (value,)
        if name not in _PASSING and all(isinstance(item, _PLAIN) for item in items):
            yield f"{name} {value!r}"
    if hasattr(module, "_active_adapter"):
        yield repr(adapter_state(module))


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers and tensors that are neither, as memory."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    for name, tensor in sorted({**module._parameters, **module._buffers, **plain}.items()):
        for memory in [] if tensor is None else memory_of(tensor):
            if memory.device.type == "meta":
                raise UnsupportedOption(f"{name} of a {type(module).__name__} is not in memory")
            yield name, memory


def _contents(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()
