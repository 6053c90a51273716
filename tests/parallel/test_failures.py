"""A rank that dies, hangs, fails or disagrees ends both, soon and with one reason, which requests under way are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from launch import HERE

REASONS = {
    "rank_1_dies": "a rank has died",
    "rank_1_dies_in_prefill": "a rank has died",
    "rank_1_hangs": "a rank does not answer",
    "rank_1_fails": "rank 1 failed: ValueError: a bad day",
    "rank_1_disagrees": "rank 1 disagrees with rank 0",
    "rank_0_interrupted": "rank 0 failed: KeyboardInterrupt",
    "hooks_on_rank_0": "rank 1 has forward hooks on other modules than rank 0",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("failures") / "out.json"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "failures.py"), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", REASONS)
def test_requests_under_way_are_told(outcomes, case):
    outcome, reason = outcomes[case], REASONS[case]
    rank_0, rank_1 = outcome["codes"]
    assert rank_0 == 7 and rank_1 == (-signal.SIGKILL if case.startswith("rank_1_dies") else 1), outcome["said"]
    report = outcome["report"]
    assert reason in report["raised"] or report["raised"] == "KeyboardInterrupt"
    assert sorted(report["ends"]) == ["a", "b"] and all(reason in error for error in report["ends"].values())
    assert report["again"] == "refused"


@pytest.mark.parametrize("case, code", [("rank_0_dies", -signal.SIGKILL), ("rank_0_hangs", 7)])
def test_those_that_follow_end_with_rank_0(outcomes, case, code):
    outcome = outcomes[case]
    assert outcome["codes"] == [code, 1], outcome["said"]
    said = outcome["said"][1]
    assert "ParallelError: a rank has died" in said or "ParallelError: a rank does not answer" in said, said


def test_a_program_that_ends_well_ends_those_that_follow(outcomes):
    assert outcomes["rank_0_just_ends"]["codes"] == [0, 0], outcomes["rank_0_just_ends"]["said"]
