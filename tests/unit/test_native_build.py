from __future__ import annotations

import os
from pathlib import Path

import pytest

from blaze.engines.llm.native.build import library


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes its arguments where it was told to, and counts its calls."""
    script = tmp_path / "bin" / "g++"
    script.parent.mkdir()
    script.write_text(
        """#!/bin/sh
case "$*" in *--version*) echo "test compiler 1"; exit 0;; esac
echo called >> "$(dirname "$0")/calls"
while [ $# -gt 1 ]; do [ "$1" = "-o" ] && echo "compiled" > "$2"; shift; done
""",
        encoding="utf-8",
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.delenv("CXX", raising=False)
    library.cache_clear()
    return script


def calls(compiler: Path) -> int:
    file = compiler.with_name("calls")
    return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0


def test_the_kernels_are_compiled_once(compiler: Path, tmp_path: Path) -> None:
    built = library(tmp_path / "cache")
    assert built is not None
    assert built.read_text(encoding="utf-8") == "compiled\n"
    library.cache_clear()  # as another process would find it
    assert library(tmp_path / "cache") == built
    assert calls(compiler) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [built.name], "no scratch is left"


def test_another_compiler_has_a_library_of_its_own(compiler: Path, tmp_path: Path) -> None:
    first = library(tmp_path / "cache")
    compiler.write_text(compiler.read_text(encoding="utf-8").replace("compiler 1", "compiler 2"))
    library.cache_clear()
    assert library(tmp_path / "cache") not in (None, first)


def test_without_a_compiler_there_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    library.cache_clear()
    assert library(tmp_path / "cache") is None
    assert "no C++ compiler" in caplog.text


def test_what_the_compiler_refuses_is_said_and_leaves_nothing(
    compiler: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.write_text("#!/bin/sh\necho 'error: no such flag' >&2\nexit 1\n", encoding="utf-8")
    assert library(tmp_path / "cache") is None
    assert "no such flag" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_library_that_others_can_write_is_not_run(
    compiler: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built = library(tmp_path / "cache")
    assert built is not None
    built.chmod(0o777)
    library.cache_clear()
    assert library(tmp_path / "cache") is None
    assert "can be written by others" in caplog.text
    assert calls(compiler) == 1
