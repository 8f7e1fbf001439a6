"""Converted models on disk: a GGUF file becomes a safetensors folder once, and is loaded fast after that."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from filelock import FileLock

from blaze.errors import ModelSourceError
from blaze.models.contents import contents
from blaze.models.sources import FolderSource, GGUFSource, HubSource, ModelSource

ProgressReport: TypeAlias = Callable[[str, int, int], None]  # (what is being done, step, of how many)
_CONVERTED = "blaze.converted"  # written last: a folder without it is a conversion that was cut off
_HASHED_BYTES = 1 << 20


def local_model(source: ModelSource, cache: Path, progress: ProgressReport | None = None) -> str:
    """What ``from_pretrained`` is given: a folder, or a hub id. Converts a GGUF file on first use."""
    if isinstance(source, FolderSource):
        return str(source.path)
    if isinstance(source, HubSource):
        return source.repo
    return str(converted(source, cache, progress))


def converted(source: GGUFSource, cache: Path, progress: ProgressReport | None = None) -> Path:
    """The safetensors folder of a GGUF file; one process converts, the others wait for it."""
    folder = cache / "converted" / f"{source.path.stem}-{fingerprint(source.path)}"
    if (folder / _CONVERTED).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / _CONVERTED).exists():
            _convert(source.path, folder, progress or (lambda _what, _step, _total: None))
    return folder


def is_converted(source: ModelSource, cache: Path) -> bool:
    """False when loading the source will have to convert it first."""
    if not isinstance(source, GGUFSource):
        return True
    return (cache / "converted" / f"{source.path.stem}-{fingerprint(source.path)}" / _CONVERTED).exists()


def identity(source: ModelSource, cache: Path, *, commit: str | None = None) -> str:
    """Of the weights: the same wherever they lie, and another one when any of them is. ``commit``: of a hub
    id, what was loaded, for its revision may be a branch."""
    if isinstance(source, HubSource):
        return f"{source.repo}@{commit or source.revision}"
    folder = Path(local_model(source, cache))
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(f"{file.name} {contents(file, cache)}\n".encode())
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """Tells versions of a file apart by its size and its first and last MiB (metadata, and some weights)."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        digest.update(file.read(_HASHED_BYTES))
        file.seek(max(0, size - _HASHED_BYTES))
        digest.update(file.read(_HASHED_BYTES))
    return digest.hexdigest()


def _convert(gguf: Path, folder: Path, progress: ProgressReport) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # ``progress`` shows it
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        progress("reading the tokenizer", 0, 3)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        progress("reading the weights", 1, 3)
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
        progress("writing safetensors", 2, 3)
        # The weights are dequantized by now; the leftover mark would only make saving refuse.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        tokenizer.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        (unfinished / _CONVERTED).write_text(gguf.name, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        progress("done", 3, 3)
    except (OSError, ValueError, KeyError) as error:
        raise ModelSourceError(f"source {gguf}: cannot be converted: {error}", param="source") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
