"""Which clusters `blaze up` runs on this machine: a small file each, for the other commands to find."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from blaze.config import state_dir


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """What `blaze up` tells the other commands of its cluster, as a file in ``state_dir()``."""

    cluster_id: str
    pid: int
    address: str  # of Ray
    dashboard: str  # where `serve deploy` goes
    url: str  # where requests go


def write_record(record: ClusterRecord) -> Path:
    path = state_dir() / f"{record.cluster_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_text(json.dumps(asdict(record)), encoding="utf-8")
    return path


def read_records() -> list[ClusterRecord]:
    """The newest first; also of clusters whose `blaze up` has died."""
    files = sorted(state_dir().glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [ClusterRecord(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def newest_running() -> ClusterRecord | None:
    return next((record for record in read_records() if is_running(record)), None)


def is_running(record: ClusterRecord) -> bool:
    """The process that wrote the record lives, and is not one that got its number later."""
    try:
        return "up" in psutil.Process(record.pid).cmdline()
    except psutil.NoSuchProcess:
        return False


def remove_record(cluster_id: str) -> None:
    (state_dir() / f"{cluster_id}.json").unlink(missing_ok=True)
