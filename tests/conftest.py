"""Shared by all tests: fixed seeds, and no more threads than OMP_NUM_THREADS allows."""

from __future__ import annotations

import os
import random
import sys

import pytest

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
