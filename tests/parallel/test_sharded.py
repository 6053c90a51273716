"""Two ranks hold a model: tokens, logits and traffic, compared by every rank with the model in one process."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from launch import HERE, python, reports, torchrun


def names() -> list[str]:
    """The checks in checks.py, which imports what this process need not."""
    tree = ast.parse(Path(__file__).with_name("checks.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    tables = [node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id in ("MODELS", "QUANTIZED")]
    models = [key.value for table in tables for key in table.value.keys]
    return [f"tokens and logits of {model}" for model in models] + [function.name for function in functions]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, list[str]]:
    return reports("checks.py", folder=tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("name", names())
def test_sharded(report, name):
    assert report[name] == [], "\n".join(report[name])


def test_four_ranks_with_fewer_key_heads(tmp_path):
    report = reports("four_ranks.py", folder=tmp_path, start=python)
    assert len(report) == 3 and not any(report.values()), report


@pytest.mark.slow
def test_some_call_and_some_follow(tmp_path):
    """Three ranks, of which the third only follows, while rank 0 has another thread that steps the engine."""
    done = torchrun(str(HERE / "mixed.py"), str(tmp_path / "out"), ranks=3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out.0").read_text() == (tmp_path / "out.1").read_text()
