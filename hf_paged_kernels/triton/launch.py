"""How every Triton kernel is launched, and what launchers ask about the device.

All launches pass through `launch`, so that the same launchers can be run for a GPU that is not here: `recording` hands
each launch, as it would have been, to a function that compiles it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.util import find_spec

import torch

MIN_TRITON = (3, 6)
_observers = threading.local()
_recorder: Callable | None = None
_target: str | None = None
_tuning: dict[str, dict[str, int]] = {}


def launch(kernel, grid: tuple, *args, **meta) -> None:
    """Run `kernel` on `grid` programs, on the current stream of the current device.

    Args:
        args: its arguments in order.
        meta: its constexpr arguments and compile options (num_warps, num_stages) by name.
    """
    meta.setdefault("enable_fp_fusion", True)  # a * b + c rounds once; newer releases of triton want to be told
    observer = getattr(_observers, "active", None)
    if _recorder is not None:
        _recorder(kernel, grid, args, meta)
    elif observer is None:
        kernel[grid](*args, **meta)
    else:
        with observer(kernel):
            kernel[grid](*args, **meta)


@contextmanager
def observing(observer: Callable[[object], AbstractContextManager]):
    """While inside, this thread's launches run in the context `observer(kernel)`."""
    outside = getattr(_observers, "active", None)
    _observers.active = observer
    try:
        yield
    finally:
        _observers.active = outside


@contextmanager
def recording(target: str, record: Callable[[object, tuple, tuple, dict], None]):
    """While inside, nothing is launched: `record(kernel, grid, args, meta)` is called instead.

    Launchers choose their tiles for the architecture `target` ("sm_90", "gfx942"), and CPU tensors stand for the device's.
    """
    global _recorder, _target
    assert _recorder is None, "recording inside recording"
    _recorder, _target = record, target
    try:
        yield
    finally:
        _recorder = _target = None


@contextmanager
def tuning(kernel: str, **values: int):
    """While inside, the launcher of `kernel` takes these tile sizes and compile options, by its own names for them."""
    outside = _tuning.get(kernel)
    _tuning[kernel] = values
    try:
        yield
    finally:
        del _tuning[kernel]
        if outside is not None:
            _tuning[kernel] = outside


def tuned(kernel: str, **chosen: int) -> tuple[int, ...]:
    """What a launcher chose, or what `tuning` gives instead, in the order of the keywords.

    Raises ValueError if `tuning` has a name that the launcher does not.
    """
    values = _tuning.get(kernel)
    if values is None:
        return tuple(chosen.values())
    if unknown := values.keys() - chosen.keys():
        raise ValueError(f"{kernel} has no {sorted(unknown)[0]!r} to tune; there are {', '.join(chosen)}")
    return tuple((chosen | values).values())


def why_unavailable(device: torch.device | str) -> str | None:
    """Why Triton kernels cannot run on `device`, or None if they can."""
    if _recorder is not None:
        return None
    kind = torch.device(device).type
    if find_spec("triton") is None:
        return "the package triton is not installed"
    version, interpreted = _triton()
    if version < MIN_TRITON:
        return f"triton {'.'.join(map(str, version))} is too old: {'.'.join(map(str, MIN_TRITON))} or newer is needed"
    if kind == "cpu":
        return None if interpreted else "it runs on CUDA tensors only (on CPU tensors with TRITON_INTERPRET=1)"
    if kind != "cuda":
        return f"it does not run on {kind}"
    if interpreted:
        return "TRITON_INTERPRET=1 is set, which is for CPU tensors"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or higher"
    return None


def why_dtype_unavailable(device: torch.device | str, dtype: torch.dtype | None) -> str | None:
    """Why kernels on `device`, on which kernels run, cannot have tensors of `dtype`, or None if they can."""
    if dtype == torch.float8_e4m3fn:
        name = arch(torch.device(device))
        if name.startswith("sm_") and int(name[3:]) < 89:
            return f"fp8 needs compute capability 8.9, not that of {name}; int8 is possible"
    return None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return find_spec("triton") is not None and _triton()[1]


@cache
def _triton() -> tuple[tuple[int, int], bool]:
    """(version, whether kernels are interpreted). triton decides the latter when it is imported."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    knobs = getattr(triton, "knobs", None)
    return version, bool(knobs is not None and knobs.runtime.interpret)


def arch(device: torch.device) -> str:
    """ "sm_90", "gfx942" and the like; "interpreter" for CPU tensors."""
    if _target is not None:
        return _target
    return "interpreter" if device.type == "cpu" else _arch(device.index)


def is_amd(device: torch.device) -> bool:
    return arch(device).startswith("gfx")


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of the device; an H100's 132 where there is none."""
    return 132 if device.type == "cpu" else _properties(device.index).multi_processor_count


@cache
def _arch(index: int | None) -> str:
    properties = _properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def _properties(index: int | None):
    return torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
