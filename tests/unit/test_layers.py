"""Imports point down only. Checked over the source, imports inside functions included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each room may import itself and the rooms before it.
ORDER = ("base", "core", "quant", "parallel", "runtime", "engine", "hf", "integrations")
BESIDE = {("parallel", "quant")}  # neighbours in the order that do not know each other
ON_TOP = {("ray_serve", "openai")}  # an adapter that stands on another: replicas of the app
FREE = {"", "cli", "__main__", "benchmarks"}  # hf_paged/__init__.py, the programs: may import everything
WITHOUT_TORCH = {"base", "core"}
WITH_TRANSFORMERS = {"hf", "integrations"}
KERNELS = "hf_paged_kernels"


def room_of(module: str) -> str:
    """The room of a dotted module name: "hf_paged.core.blocks" is in "core", hf_paged itself in ""."""
    parts = module.split(".")
    return KERNELS if parts[0] == KERNELS else parts[1] if len(parts) > 1 else ""


def imports(tree: ast.AST, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import, `from x import y` as x.y; import_module("x") counts too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    here = room_of(module)
    found = imports(ast.parse(source), module, is_package)
    problems = ((line, name, problem(here, module, name)) for line, name in found)
    return [f"{module}, line {line}: {name}: {why}" for line, name, why in problems if why]


def problem(here: str, module: str, name: str) -> str:
    """Why `module` in room `here` may not import `name`; empty if it may."""
    top = name.split(".")[0]
    if here == KERNELS:
        return "kernels know neither hf_paged nor transformers" if top in ("hf_paged", "transformers") else ""
    if here in FREE:
        return ""
    if top in ("torch", "triton", KERNELS) and here in WITHOUT_TORCH:
        return f"{here} does without torch"
    if top == "transformers" and here not in WITH_TRANSFORMERS:
        return "only hf and what lies above it import transformers"
    if top != "hf_paged":
        return ""
    there = room_of(name)
    if there not in ORDER:  # a public name of hf_paged itself, the command line, the benchmarks
        return (
            "" if here == "integrations" and there not in FREE - {""} else f"{here} may not look up to {there or top}"
        )
    if here == there == "integrations":
        mine, other = module.split(".")[2:3], name.split(".")[2:3]
        if mine == other or not mine or (*mine, *other) in ON_TOP:
            return ""
        return "adapters never import each other"
    if (here, there) in BESIDE or (there, here) in BESIDE or ORDER.index(there) > ORDER.index(here):
        return f"{here} may not import {there}"
    return ""


def sources() -> list[tuple[Path, str]]:
    """Every source file with its dotted module name."""
    folders = {"hf_paged": "hf_paged", KERNELS: KERNELS, "integrations": "hf_paged.integrations"}
    return [
        (path, ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(".__init__"))
        for folder, package in folders.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def test_every_room_is_known():
    rooms = {room_of(module) for _, module in sources()}
    assert rooms <= {*ORDER, *FREE, KERNELS}, "a new folder needs its place in the order"
    assert len(sources()) > 10


def test_imports_point_down():
    found = [
        line
        for path, module in sources()
        for line in violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hf_paged.base.config", "import torch"),
        ("hf_paged.core.blocks", "def f():\n    from torch import nn"),
        ("hf_paged.core.blocks", "from ..runtime import runner"),
        ("hf_paged.core.blocks", "from .. import engine"),
        ("hf_paged.core.blocks", "from hf_paged_kernels import ops"),
        ("hf_paged.engine.engine", "from ..hf.patch import patch"),
        ("hf_paged.engine.engine", "import importlib\nimportlib.import_module('transformers')"),
        ("hf_paged.runtime.runner", "import transformers.models"),
        ("hf_paged.runtime.runner", "import hf_paged"),
        ("hf_paged.quant.linear", "from hf_paged.parallel import group"),
        ("hf_paged.hf.patch", "from hf_paged.integrations import openai"),
        ("hf_paged.hf.patch", "from ..cli import main"),
        ("hf_paged.integrations.pipeline", "from . import openai"),
        ("hf_paged_kernels.ops", "import hf_paged.base"),
        ("hf_paged_kernels.ops", "from transformers import AutoModel"),
    ],
)
def test_the_check_finds(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hf_paged.core.blocks", "from ..base.errors import InvalidArgument\nimport hashlib"),
        ("hf_paged.core.blocks", "from .plan import StepPlan"),
        ("hf_paged.runtime.runner", "import torch\nimport hf_paged_kernels"),
        ("hf_paged.engine.engine", "from hf_paged.core import scheduler"),
        ("hf_paged.hf.engine", "from ..engine.engine import BatchEngine\nimport transformers"),
        ("hf_paged.integrations.pipeline", "import hf_paged\nfrom hf_paged import patch\nimport transformers"),
        ("hf_paged.integrations.openai.app", "from .sse import stream"),
        ("hf_paged.cli.demo", "import transformers\nimport hf_paged.benchmarks"),
        ("hf_paged_kernels.ops", "import torch, triton"),
    ],
)
def test_the_check_allows(module, source):
    assert not violations(source, module)
