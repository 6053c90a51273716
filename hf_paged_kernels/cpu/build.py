"""Compile the C++ kernels of this folder on first use, and load them.

Every `*.cpp` beside this file becomes part of one shared library with a plain C interface, opened with ctypes (so a
kernel runs without the GIL). Sources include only `ATen/Parallel.h` and `ATen/cpu/vec/vec.h`: the headers for torch
extensions would take fifteen times as long to compile. The library is cached under a hash of all it depends on.

The library is not linked with an OpenMP of its own: its references are left to libtorch_cpu's dependencies, so the
kernels run on the threads torch already has, and `torch.set_num_threads` governs both.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent
_LIBRARY_NAME = "libhf_paged_kernels.so"

# -ffp-contract=off: whether a*b+c is fused would otherwise differ between two instances of the same template, and
# with it the last bit of a row's result. Kernels say fmadd where they want it.
_COMMON_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-DAT_PARALLEL_OPENMP=1", "-fno-math-errno",
                 "-fno-trapping-math", "-ffp-contract=off", "-fvisibility=hidden", "-w")  # fmt: skip
_CAPABILITY_FLAGS = {
    "AVX2": ("-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl",
               "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
}  # fmt: skip
_DEFAULT_FLAGS = ("-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT")

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_failure: str | None = None


class KernelBuildError(RuntimeError):
    """The compiled kernels cannot be had on this machine; the message says why and what to do."""


def load() -> ctypes.CDLL:
    """The compiled kernels, built on the first call (some seconds) and found in the cache ever after.

    Raises:
        KernelBuildError: there is no compiler, compiling failed, or HF_PAGED_KERNELS=off.
    """
    if _switched_off():
        raise KernelBuildError("compiled kernels are switched off by HF_PAGED_KERNELS=off")
    if _library is None:
        _load_once()
    if _library is None:
        raise KernelBuildError(_failure)
    return _library


def available() -> bool:
    """Whether the compiled kernels can be used; builds them on the first call, and warns once if that fails."""
    if _switched_off():
        return False
    if _library is None and _failure is None:
        _load_once()
    return _library is not None


def why_unavailable() -> str | None:
    """Why `available()` is False, in a sentence or a shortened compiler message; None if it is True."""
    if _switched_off():
        return "compiled kernels are switched off by HF_PAGED_KERNELS=off"
    return None if available() else _failure


def capability() -> str:
    """The vector instructions the kernels are compiled for: what torch itself uses on this machine."""
    name = torch.backends.cpu.get_cpu_capability()
    return name if name in _CAPABILITY_FLAGS else "DEFAULT"


def _product_flags() -> tuple[str, ...]:
    """Products of int8 and of bf16 values in one instruction, where there is AVX-512 and the processor has them."""
    if capability() != "AVX512":
        return ()
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    flags = {"avx512_vnni": "-mavx512vnni", "avx512_bf16": "-DHF_PAGED_AVX512_BF16"}
    return tuple(flag for feature, flag in flags.items() if feature in processor)


def _switched_off() -> bool:
    return os.environ.get("HF_PAGED_KERNELS", "").lower() == "off"


def _load_once() -> None:
    global _library, _failure
    with _lock:
        if _library is not None or _failure is not None:
            return
        try:
            _library = ctypes.CDLL(str(build()))
        except (KernelBuildError, OSError) as error:
            _failure = str(error)
            warnings.warn(
                f"hf_paged runs its slower reference kernels, because the compiled ones are unavailable: {_failure}",
                RuntimeWarning,
                stacklevel=4,
            )


def build(sources: list[Path] | None = None, cache_dir: Path | None = None) -> Path:
    """Compile `sources` (default: every .cpp of this folder) unless the cache has them; the library's path."""
    sources = sorted(_HERE.glob("*.cpp")) if sources is None else sources
    compiler = _find_compiler()
    flags = (*_COMMON_FLAGS, *_CAPABILITY_FLAGS.get(capability(), _DEFAULT_FLAGS), *_product_flags())
    key = _key(sources, compiler, flags)
    library = (cache_dir or _default_cache_dir()) / key / _LIBRARY_NAME
    if not library.exists():
        library = _writable(library.parent) / _LIBRARY_NAME
        with _one_builder(library.parent):
            if not library.exists():
                _compile(sources, compiler, flags, library)
    return library


def _find_compiler() -> str:
    if not sys.platform.startswith("linux"):
        raise KernelBuildError(f"they are built on Linux only so far, and this is {sys.platform}")
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        path = shutil.which(name)
        if path:
            return path
    if wanted:
        raise KernelBuildError(f"the C++ compiler named by CXX, {wanted!r}, was not found")
    raise KernelBuildError("no C++ compiler was found; install g++ (Debian, Ubuntu: apt install g++; Fedora: dnf "
                           "install gcc-c++; conda: conda install gxx)")  # fmt: skip


def _key(sources: list[Path], compiler: str, flags: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    for text in (compiler, version, torch.__version__, platform.machine(), *flags):
        digest.update(text.encode() + b"\0")
    headers = {header for source in sources for header in source.parent.glob("*.h")}
    for path in (*sources, *sorted(headers)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _compile(sources: list[Path], compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """Compile every source as its own process, link, and rename: other processes see all of the library or none."""
    torch_dir = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:

        def compile_one(source: Path) -> str:
            target = f"{scratch}/{source.stem}.o"
            _run([compiler, *flags, f"-I{torch_dir / 'include'}", "-c", str(source), "-o", target], source.name)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        # No -fopenmp here: that would add the system's libgomp beside the one torch brings.
        result = f"{scratch}/{library.name}"
        libraries = (f"-L{torch_dir / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_dir / 'lib'}")
        _run([compiler, "-shared", *objects, "-o", result, *libraries], "linking")
        os.replace(result, library)


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise KernelBuildError(f"{command[0]} failed on {what}: {' | '.join(lines[:3])[:600]}")


@contextmanager
def _one_builder(folder: Path):
    """Let other processes wait for the one that compiles; where files cannot be locked, all of them compile."""
    import fcntl

    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "hf_paged" / "kernels"


def _writable(folder: Path) -> Path:
    """`folder`, or where that cannot be written a fresh one of this process's own (never a shared, guessable name)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="hf_paged_kernels_"))
