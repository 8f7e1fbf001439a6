"""One short run of chaos. `make chaos` makes many long ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster


def test_nothing_is_lost_wrong_or_leaked_in_a_short_run_of_chaos(tmp_path: Path) -> None:
    """In a process of its own: faults are set over Serve's handles, whose threads would stay in this one."""
    found = tmp_path / "found.json"
    options = ["--seeds", "4", "--seconds", "24", "--period", "4", "--stall-after", "3", "--json", str(found)]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert found.exists(), ended.stdout + ended.stderr
    (result,) = json.loads(found.read_text())
    told = ended.stdout
    assert sum(result["faults"].values()) >= 4, told
    assert result["score"]["sent"] >= 100, told
    assert (result["score"]["lost"], result["score"]["wrong"]) == ([], []), told
    assert result["unsettled"] == [], told
    assert ended.returncode == 0, told
