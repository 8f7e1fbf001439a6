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
    started: float  # when that process started: a number alone may belong to another by now
    address: str  # of Ray
    dashboard: str  # where `serve deploy` goes
    url: str  # where requests go; empty while the cluster is starting
    grace_s: float = 0.0  # how long what is being answered may take when it is told to stop


def write_record(record: ClusterRecord) -> Path:
    path = state_dir() / f"{record.cluster_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(record)), encoding="utf-8")
    unfinished.rename(path)
    return path


def read_records() -> list[ClusterRecord]:
    """The newest first; also of clusters whose `blaze up` has died. Files that are none are passed over."""
    found = []
    for file in state_dir().glob("*.json"):
        try:
            found.append(ClusterRecord(**json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda record: record.started, reverse=True)


def newest_running() -> ClusterRecord | None:
    """The newest cluster that has got as far as having an address."""
    return next((record for record in read_records() if record.url and is_running(record)), None)


def is_running(record: ClusterRecord) -> bool:
    """The process that wrote the record lives, and is not one that got its number later."""
    try:
        return abs(psutil.Process(record.pid).create_time() - record.started) < 1.0
    except psutil.NoSuchProcess:
        return False


def remove_record(cluster_id: str) -> None:
    (state_dir() / f"{cluster_id}.json").unlink(missing_ok=True)
