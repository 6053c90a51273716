"""Shared by all tests: fixed seeds, no more threads than OMP_NUM_THREADS allows, Triton's interpreter without a GPU."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from compile_table import compiled, print_table

# triton reads this when it is imported.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests never look for a hub: a model is built here or not used at all.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _fixed_seeds():
    """The same random numbers for every test, in any order. torch is seeded where a test has imported it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_finish(session) -> None:
    if "torch" in sys.modules and (threads := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        sys.modules["torch"].set_num_threads(max(1, int(threads)))


def pytest_terminal_summary(terminalreporter, config) -> None:
    if lines := compiled(terminalreporter):
        print_table(terminalreporter, lines)
