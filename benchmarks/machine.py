"""What the machine is, and who uses its processors: a result that others disturbed is told from one that
nobody did."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Self

import psutil

OURS = ("torch", "transformers", "ray")


def describe() -> str:
    return f"{cpu_model()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


def versions() -> dict[str, str]:
    from blaze.version import __version__

    return {"blaze": __version__, **{name: version(name) for name in OURS}}


def marked(name: str, value: str) -> list[psutil.Process]:
    """Living processes with this variable in their environment, wherever they have been adopted."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(name) == value:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Used by these processes so far."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def all_cpu_seconds() -> float:
    """Used by everybody so far, and taken from the machine by its host."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


@dataclass
class CpuUse:
    """Inside the ``with``: what these processes and this one use, and what all the others do, in cores."""

    processes: list[psutil.Process]
    own: float = 0.0
    others: float = 0.0
    _begin: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0), repr=False)

    def _now(self) -> tuple[float, float, float]:
        times = os.times()  # with the children that have ended: load clients are such
        mine = times.user + times.system + times.children_user + times.children_system
        own = cpu_seconds(self.processes)
        return time.perf_counter(), own, all_cpu_seconds() - own - mine

    def __enter__(self) -> Self:
        self._begin = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        seconds, own, others = (end - begin for end, begin in zip(self._now(), self._begin, strict=True))
        self.own, self.others = own / seconds, max(0.0, others / seconds)
