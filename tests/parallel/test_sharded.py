"""Two ranks hold a model: tokens, logits and traffic, compared by every rank with the model in one process."""

from __future__ import annotations

import ast
from functools import partial
from pathlib import Path

import pytest
from launch import HERE, python, reports, torchrun


def names(script: str) -> list[str]:
    """The checks in a script, which imports what this process need not."""
    tree = ast.parse(Path(__file__).with_name(script).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    tables = [node for node in assigned if node.targets[0].id in ("MODELS", "QUANTIZED")]
    models = [key.value for table in tables for key in table.value.keys]
    return [f"tokens and logits of {model}" for model in models] + [function.name for function in functions]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, list[str]]:
    return reports("checks.py", folder=tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> dict[str, list[str]]:
    return reports("features.py", folder=tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> dict[str, list[str]]:
    start = partial(torchrun, TRITON_INTERPRET="1")
    return reports("graphs.py", folder=tmp_path_factory.mktemp("graphs"), start=start)


@pytest.mark.parametrize("name", names("checks.py"))
def test_sharded(report, name):
    assert report[name] == [], "\n".join(report[name])


@pytest.mark.parametrize("name", names("features.py"))
def test_features(features, name):
    assert features[name] == [], "\n".join(features[name])


@pytest.mark.parametrize("name", names("graphs.py"))
def test_recorded_steps(recorded, name):
    assert recorded[name] == [], "\n".join(recorded[name])


def test_four_ranks_with_fewer_key_heads(tmp_path):
    report = reports("four_ranks.py", folder=tmp_path, start=python)
    assert len(report) == 3 and not any(report.values()), report


@pytest.mark.slow
def test_some_call_and_some_follow(tmp_path):
    """Three ranks, of which the third only follows, while rank 0 has another thread that steps the engine."""
    done = torchrun(str(HERE / "mixed.py"), str(tmp_path / "out"), ranks=3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out.0").read_text() == (tmp_path / "out.1").read_text()
