from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from blaze.records import (
    ClusterRecord,
    is_running,
    newest_running,
    read_records,
    remove_record,
    write_record,
)

NO_SUCH_PID = 2**22 + 1  # above the largest that Linux gives out


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def record(name: str, *, pid: int = NO_SUCH_PID, started: float = 1.0) -> ClusterRecord:
    url = f"http://127.0.0.1/{name}"
    return ClusterRecord(name, pid, started, "127.0.0.1:6379", "http://127.0.0.1:8265", url)


def own_start() -> float:
    return psutil.Process(os.getpid()).create_time()


def test_records_are_read_as_written_the_newest_first() -> None:
    assert read_records() == []
    old, new = record("old", started=1.0), record("new", started=2.0)
    write_record(new)
    write_record(old)
    assert read_records() == [new, old]
    remove_record("new")
    remove_record("new")
    assert read_records() == [old]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_files_that_are_no_records_are_passed_over(content: str) -> None:
    folder = write_record(record("good")).parent
    (folder / "bad.json").write_text(content)
    assert read_records() == [record("good")]


def test_only_its_owner_may_look_into_the_folder() -> None:
    assert write_record(record("c")).parent.stat().st_mode & 0o077 == 0


def test_a_cluster_whose_process_is_gone_does_not_run() -> None:
    write_record(record("stale"))
    assert not is_running(record("stale"))
    assert newest_running() is None


def test_the_newest_cluster_whose_process_lives_is_found() -> None:
    mine = record("mine", pid=os.getpid(), started=own_start())
    write_record(mine)
    write_record(record("stale", started=own_start() + 100))
    assert newest_running() == mine


def test_a_process_that_got_the_number_later_is_not_taken_for_it() -> None:
    assert not is_running(record("c", pid=os.getpid(), started=own_start() - 100))
