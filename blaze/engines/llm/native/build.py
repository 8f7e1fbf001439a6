"""Compiling the kernels for the processor at hand, once, into the cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = sorted(_FOLDER.glob("*.cpp"))
_HEADERS = sorted(_FOLDER.glob("*.h"))
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-fopenmp",
)
_TIMEOUT_S = 120


@cache
def library(folder: Path) -> Path | None:
    """The compiled kernels, or None (said once in the log) where there is no compiler that makes them.

    The name holds everything that the result depends on: a shared folder may serve unlike machines.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        logger.warning("no C++ compiler found: the LLM engine runs on torch's operators alone, slower")
        return None
    target = folder / f"kernels-{_fingerprint(compiler)}.so"
    if target.exists():
        return target if _is_ours(target) else None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / target.name
        try:
            subprocess.run(
                [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(built)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", None) or error
            logger.warning("the CPU kernels were not compiled, torch's operators serve instead: %s", detail)
            return None
        built.chmod(0o755)  # whatever the umask
        built.replace(target)  # whole or not at all, also when two replicas build at once
    return target


def _is_ours(target: Path) -> bool:
    """What others could have written is not run."""
    status = target.stat()
    ours = status.st_uid in {0, os.getuid()} and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not ours:
        logger.warning("%s can be written by others: torch's operators serve instead", target)
    return ours


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [file.read_text(encoding="utf-8") for file in (*_SOURCES, *_HEADERS)]
    parts = (*sources, " ".join(_FLAGS), version, platform.machine(), _cpu())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """What `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
