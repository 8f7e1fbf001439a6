"""`blaze up` as a process of its own, and every process that descends from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.waiting import eventually

_MARK = "BLAZE_TEST_RUN"


@dataclass
class BlazeUp:
    process: subprocess.Popen[str]
    log: Path
    mark: str
    environment: dict[str, str]

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait_for(self, text: str, *, within_s: float = 120) -> None:
        def seen() -> bool:
            assert text in self.output() or self.process.poll() is None, self.output()
            return text in self.output()

        eventually(seen, within_s=within_s, every_s=0.1)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def descendants(self) -> list[psutil.Process]:
        """Living processes that inherited this run's mark, wherever they have been adopted since."""
        found = []
        for process in psutil.process_iter():
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get(_MARK) == self.mark and process.pid != self.process.pid:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def listening(self) -> set[tuple[str, int]]:
        """Address and port of every TCP socket that a descendant listens on."""
        found = set()
        for process in self.descendants():
            try:
                connections = process.net_connections(kind="inet")
            except psutil.NoSuchProcess:  # an idle worker may end at any time
                continue
            found |= {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}
        return found

    def run(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Another `blaze` command, in the same environment."""
        return subprocess.run(
            [sys.executable, "-m", "blaze.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@contextmanager
def blaze_up(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[BlazeUp]:
    """Started, not yet ready. At the end it is killed with all that descends from it, if need be."""
    mark = uuid.uuid4().hex
    own = {
        _MARK: mark,
        "XDG_STATE_HOME": str(folder / "state"),
        "COLUMNS": "200",
        "PYTHONUNBUFFERED": "1",
    }
    inherited = os.environ | own | dict(environment or {})
    log = folder / "blaze-up.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "blaze.cli", "up", *arguments],
            env=inherited,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    running = BlazeUp(process, log, mark, inherited)
    try:
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=10)
        for left in running.descendants():
            with suppress(psutil.NoSuchProcess):
                left.kill()
