"""Every kernel compiles, through its launcher, for GPUs that need not be here, and wastes nothing.

The table of registers and shared memory is printed at the end of the test run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_table import COMPILED

SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_without_spills(arch, tmp_path, record_property):
    report = tmp_path / "lines.json"
    command = [sys.executable, str(SCRIPT), "--arch", arch, "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert report.exists(), done.stderr
    lines = json.loads(report.read_text())
    record_property(COMPILED, lines)
    assert lines and not [line for line in lines if line["problem"]], done.stdout
