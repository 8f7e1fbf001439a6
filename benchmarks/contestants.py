"""Processes that are measured in turns: one works, the others wait and use no processor.

Every process of a contestant inherits a mark in its environment. By it its use of the processors is
counted, and by it all that it has started is found and ended, by process id, whatever has become of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from benchmarks.machine import cpu_seconds, marked

_MARK = "BLAZE_BENCHMARK_RUN"


class Contestant:
    """A context manager: inside it the process runs; after it nothing that it has started is left."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        logs_output: bool = False,
        patience_s: float = 60.0,
    ) -> None:
        """``logs_output``: its standard output goes to the log too; a worker's is where it answers."""
        self.name = name
        self.idle_cores: list[float] = []
        self._command = list(command)
        self._log = log
        self._mark = uuid.uuid4().hex
        self._environment = os.environ | {_MARK: self._mark, "HF_HUB_OFFLINE": "1"} | dict(environment or {})
        self._logs_output = logs_output
        self._patience_s = patience_s
        self._idle_since: tuple[float, float] | None = None

    def __enter__(self) -> Self:
        with self._log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=log if self._logs_output else subprocess.PIPE,
                stderr=subprocess.STDOUT if self._logs_output else log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end it
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin
        self.go_on()  # whoever is halted hears nothing
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # the word to stop, for a worker
        if self.process.poll() is None and not self._ends_within(2.0):
            self.process.send_signal(signal.SIGTERM)
            if not self._ends_within(self._patience_s):
                self.process.kill()
                self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self._idle_since = None
        left = self.processes()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)

    def _ends_within(self, seconds: float) -> bool:
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def processes(self) -> list[psutil.Process]:
        found = {process.pid: process for process in marked(_MARK, self._mark)}
        with suppress(psutil.NoSuchProcess):
            # A process that writes a title over its environment has no mark that could be read.
            for process in psutil.Process(self.process.pid).children(recursive=True):
                found.setdefault(process.pid, process)
        return list(found.values())

    def hear(self) -> dict[str, Any]:
        """A worker's next line. Raises :class:`RuntimeError` when it has died."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended:\n{self.last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def last_words(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-3000:]

    # --- Not there while others are measured -----------------------------------------------------------

    def halt(self) -> None:
        """Stop all its processes where they are."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    # --- What it uses while others are measured --------------------------------------------------------

    def rests(self) -> None:
        self._idle_since = (time.perf_counter(), cpu_seconds(self.processes()))

    def wakes(self) -> None:
        if self._idle_since is None:
            return
        since, used = self._idle_since
        self._idle_since = None
        if (seconds := time.perf_counter() - since) > 1.0:
            self.idle_cores.append(max(0.0, cpu_seconds(self.processes()) - used) / seconds)
