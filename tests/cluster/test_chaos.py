"""One short run of chaos. `make chaos` makes many long ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

# A replica wedges, one is drained, one freezes, one is killed, one fails, and the strategy changes.
OPTIONS = ["--seeds", "34", "--seconds", "24", "--period", "3.5", "--stall-after", "3"]
KINDS = ["--kinds", "kill,stop,slow,fail,hang,block,drain,strategy"]  # a redeploy would take half a minute


def test_nothing_is_lost_wrong_or_leaked_in_a_short_run_of_chaos(tmp_path: Path) -> None:
    """In a process of its own: faults are set over Serve's handles, whose threads would stay in this one."""
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.chaos", *OPTIONS, *KINDS, "--json", str(found)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert found.exists(), ended.stdout + ended.stderr
    (result,) = json.loads(found.read_text())
    told = ended.stdout
    assert sum(result["faults"].values()) >= 4, told
    assert result["score"]["sent"] >= 100, told
    assert (result["score"]["lost"], result["score"]["wrong"]) == ([], []), told
    assert result["unsettled"] == [], told
    assert ended.returncode == 0, told
