"""Every family of transformers: the page of models says what is supported, and holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_paged.hf.supported import REASONS, REFUSED_SETTINGS, SUPPORTED

ROOT = Path(__file__).resolve().parents[2]


def rows_of_the_page() -> list[list[str]]:
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]


def test_what_is_listed_is_what_was_found_right():
    right = {model_type for _, model_type, *cells in rows_of_the_page() if "right" in cells}
    assert right == SUPPORTED
    assert len([name for name, _, *cells in rows_of_the_page() if "right" in cells]) >= 110


def test_nothing_on_the_page_is_wrong():
    assert not [name for name, *cells in rows_of_the_page() if "**wrong**" in cells]


def test_nothing_is_both_listed_and_refused():
    assert not SUPPORTED & set(REASONS)
    assert set(REFUSED_SETTINGS) <= SUPPORTED


@pytest.mark.slow
def test_every_family_is_right_or_refused():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "families" / "coverage.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
