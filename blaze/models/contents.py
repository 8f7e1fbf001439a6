"""What is in a file: all of it is read once, and again only when the file was written."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

_SETTLED_NS = 2_000_000_000  # a file that is written twice within a tick of its clock has one time


def contents(path: Path, cache: Path) -> str:
    """A digest of the whole file, which is remembered in ``cache`` where that can be written."""
    found = path.stat()
    written = f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    key = hashlib.sha256(f"{path.resolve()} {written}".encode()).hexdigest()
    note = cache / "contents" / key
    with suppress(OSError):
        if note.stat().st_mtime_ns - found.st_mtime_ns > _SETTLED_NS:
            return note.read_text(encoding="utf-8")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        unfinished = note.with_name(f"{key}.{os.getpid()}.tmp")
        unfinished.write_text(digest, encoding="utf-8")
        unfinished.replace(note)
    return digest
