"""Building the C++ kernels: the cache, concurrent processes, a missing or failing compiler, one OpenMP."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hf_paged_kernels.cpu import build

SOURCE = """
#include "answer.h"
extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }
"""
needs_compiler = pytest.mark.skipif(not build.available(), reason="no compiled kernels")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    return path


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def in_new_process(code: str, **environment) -> subprocess.Popen:
    """A process that has not loaded the kernels yet; its standard output and error are pipes."""
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})  # fmt: skip


@needs_compiler
def test_a_second_build_finds_the_first(source, tmp_path, monkeypatch):
    library = build.build([source], tmp_path / "cache")
    assert answer(library) == 42
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.build([source], tmp_path / "cache") == library


@needs_compiler
def test_a_changed_header_is_another_library(source, tmp_path):
    first = build.build([source], tmp_path / "cache")
    (tmp_path / "answer.h").write_text("#define ANSWER 43\n")
    second = build.build([source], tmp_path / "cache")
    assert first != second and (answer(first), answer(second)) == (42, 43)


@needs_compiler
def test_a_folder_that_cannot_be_written_does_not_stop_it(source, tmp_path):
    (tmp_path / "file").write_text("")
    library = build.build([source], tmp_path / "file" / "cache")
    assert answer(library) == 42 and tmp_path not in library.parents


@needs_compiler
def test_a_compiler_error_is_shown_shortened(source, tmp_path):
    source.write_text(SOURCE + "\n".join(f"int broken{i} = nothing_of_this_name_{i};" for i in range(200)))
    with pytest.raises(build.KernelBuildError, match="nothing_of_this_name_0") as caught:
        build.build([source], tmp_path / "cache")
    assert len(str(caught.value)) < 800
    assert not list((tmp_path / "cache").rglob("*.so"))


@needs_compiler
def test_processes_that_build_at_once_all_get_the_library(source, tmp_path):
    code = f"""
        import ctypes, pathlib
        from hf_paged_kernels.cpu import build
        print(ctypes.CDLL(str(build.build([pathlib.Path({str(source)!r})], pathlib.Path({str(tmp_path)!r})))).answer())
    """
    processes = [in_new_process(code) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["42\n"] * 3
    leftovers = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert leftovers == {"answer.cpp", "answer.h", "lock", "libhf_paged_kernels.so"}


@needs_compiler
def test_load_gives_one_library_and_only_one_openmp_is_in_the_process():
    code = """
        import torch
        from hf_paged_kernels.cpu import build
        assert build.load() is build.load() and build.available() and build.why_unavailable() is None
        torch.randn(300, 300) @ torch.randn(300, 300)
        maps = open("/proc/self/maps").read().split()
        print(len({name for name in maps if "libgomp" in name or "libomp" in name or "libiomp" in name}))
    """
    out, error = in_new_process(code).communicate()
    assert out == "1\n", error


def test_without_a_compiler_one_warning_says_what_to_install(tmp_path):
    code = """
        import torch, warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import hf_paged_kernels as kernels
            from hf_paged_kernels.cpu import build
            print(build.available(), build.available(), kernels.resolve_backend("auto", "cpu"))
            try:
                build.load()
            except build.KernelBuildError as error:
                print("install g++" in str(error))
        print(len(caught), "install g++" in str(caught[0].message), "reference" in str(caught[0].message))
    """
    environment = dict(PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False,
                             env={k: v for k, v in os.environ.items() if k != "CXX"} | environment)  # fmt: skip
    assert process.stdout.splitlines() == ["False False reference", "True", "1 True True"], process.stderr


def test_a_compiler_named_by_cxx_that_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.KernelBuildError, match="no-such-compiler"):
        build._find_compiler()


def test_the_switch_is_heard_at_any_time(monkeypatch):
    monkeypatch.setenv("HF_PAGED_KERNELS", "off")
    assert not build.available() and "HF_PAGED_KERNELS" in build.why_unavailable()
    with pytest.raises(build.KernelBuildError, match="HF_PAGED_KERNELS"):
        build.load()


@needs_compiler
@pytest.mark.slow  # compiles everything twice more
@pytest.mark.parametrize("wanted", ["avx2", "default"])
def test_other_instruction_sets_give_right_results(wanted):
    """torch's own switch picks the variant; the tolerance is that of the native one."""
    code = """
        import torch
        import hf_paged_kernels as kernels
        torch.manual_seed(0)
        query, key, value = torch.randn(70, 4, 40), torch.randn(70, 2, 40), torch.randn(70, 2, 24)
        slots = torch.arange(70) + 16
        metadata = kernels.AttentionMetadata(torch.tensor([0, 70]).int(), torch.tensor([70]).int(),
                                             torch.arange(1, 6)[None].int(), slots, 70, 70)
        results = []
        for backend in ("cpu", "reference"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                caches = kernels.allocate_kv(6, 2, 40, 24, 16, dtype, "cpu")
                results.append(kernels.attention_(query, key, value, *caches, metadata, scale=0.2, softcap=4.0,
                                                  window=50, backend=backend))
        for fast, reference in zip(results[:3], results[3:]):
            torch.testing.assert_close(fast, reference, atol=2e-6, rtol=0)
        print(kernels.cpu.build.capability(), torch.backends.cpu.get_cpu_capability())
    """
    out, error = in_new_process(code, ATEN_CPU_CAPABILITY=wanted).communicate()
    assert out.lower().split() == [wanted, wanted], error
