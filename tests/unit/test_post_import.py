"""Following an import: at once or later, exactly once, and without a trace."""

from __future__ import annotations

import importlib
import sys

import pytest

from hf_paged.base.post_import import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported and has not been."""
    (tmp_path / "followed_module.py").write_text("import os\nif 'BROKEN' in os.environ:\n    raise ValueError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "followed_module"
    sys.modules.pop("followed_module", None)


def test_runs_right_after_the_first_import(module):
    seen = []
    finders = list(sys.meta_path)
    when_imported(module, lambda: seen.append(module in sys.modules))
    assert seen == []
    imported = importlib.import_module(module)
    assert seen == [True]
    assert sys.meta_path == finders
    assert "exec_module" not in vars(imported.__spec__.loader)
    importlib.reload(imported)
    assert seen == [True]


def test_runs_at_once_for_a_loaded_module(module):
    importlib.import_module(module)
    finders, seen = list(sys.meta_path), []
    when_imported(module, lambda: seen.append(1))
    assert seen == [1]
    assert sys.meta_path == finders


def test_waits_for_an_import_that_succeeds(module, monkeypatch):
    seen = []
    when_imported(module, lambda: seen.append(1))
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module(module)
    assert seen == []
    monkeypatch.delenv("BROKEN")
    importlib.import_module(module)
    assert seen == [1]


def test_several_may_follow_one_module(module):
    seen = []
    when_imported(module, lambda: seen.append("first"))
    when_imported(module, lambda: seen.append("second"))
    importlib.import_module(module)
    assert sorted(seen) == ["first", "second"]


def test_other_modules_and_missing_ones_are_found_as_before(module):
    when_imported("no_such_module", lambda: pytest.fail("there is none"))
    importlib.import_module(module)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module("no_such_module")
