"""A rank takes little more memory than its share of a model, while it loads it and while it is patched."""

from __future__ import annotations

import json

from launch import HERE, python

MOST = {"bfloat16": (1.2, 1.25), "gptq": (1.6, 1.7)}  # shares, loaded and patched


def test_peak(tmp_path):
    done = python(str(HERE / "memory.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        for case, found in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            share, (loaded, patched) = found["share"], MOST[case]
            assert 0.4 * found["file"] < share < 0.7 * found["file"], (rank, case, found)
            assert share < found["loaded"] < loaded * share, (rank, case, found)
            assert found["patched"] < patched * share, (rank, case, found)
