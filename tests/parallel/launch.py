"""Starting the ranks of a test, as a user would, and what they report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def torchrun(*arguments: str, ranks: int = 2, **options: str) -> subprocess.CompletedProcess:
    """`torchrun --nproc-per-node RANKS ARGUMENTS`, on a port that is free, with the tests' helpers importable."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *arguments, **options)


def python(*arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """`python ARGUMENTS`, with the tests' helpers importable."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"} | environment
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=timeout)


def reports(script: str, *, folder: Path, start=torchrun) -> dict[str, list[str]]:
    """What the checks of a script under tests/parallel reported: name -> what went wrong, on which rank."""
    out = folder / "report.json"
    done = start(str(HERE / script), str(out))
    assert out.exists(), f"{script} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    report = json.loads(out.read_text())
    assert done.returncode == 0, f"{script} ended with {done.returncode} after {list(report)}\n{done.stderr[-6000:]}"
    return report
