"""Model sources: a hub id, a local folder, a GGUF file, or files inside an installed package.

A source is named in the config and nowhere else: what a client sends in ``model`` is looked up in the
allow-list and never reaches this module. Weights are safetensors or GGUF, never pickle.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from blaze.config import BlazeConfig
from blaze.errors import ConfigError, ModelSourceError
from blaze.types import EngineKind

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True, slots=True)
class HubSource:
    repo: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class FolderSource:
    path: Path


@dataclass(frozen=True, slots=True)
class GGUFSource:
    path: Path


ModelSource: TypeAlias = HubSource | FolderSource | GGUFSource


def parse_source(text: str, *, revision: str | None = None) -> ModelSource:
    """``package:name/path``, a path (absolute, or starting with ``.`` or ``~``), or a hub id.

    Raises :class:`ModelSourceError` when the package, folder or file is not there, or holds weights
    that could run code when loaded.
    """
    if text.startswith("package:"):
        return _local(package_path(text.removeprefix("package:")), text)
    if text.startswith(("/", ".", "~")):
        return _local(Path(text).expanduser(), text)
    if _HUB_ID.fullmatch(text):
        return HubSource(text, revision)
    raise ModelSourceError(
        f"source {text!r} is neither a hub id, nor a path, nor package:name/path", param="source"
    )


def check_sources(config: BlazeConfig) -> None:
    """Raises :class:`ConfigError` naming each model whose files are missing or unsafe."""
    wrong = []
    for index, model in enumerate(config.models):
        if model.source is not None:
            try:
                source = parse_source(model.source, revision=model.revision)
                if isinstance(source, FolderSource):
                    check_folder(source.path, model.engine)
            except ConfigError as error:
                wrong.append(f"models[{index}].{error.message}")
    if wrong:
        raise ConfigError("; ".join(wrong))


def check_folder(folder: Path, engine: EngineKind) -> None:
    """Raises :class:`ModelSourceError` for a folder that cannot be a model of this engine."""
    description = "model_index.json" if engine is EngineKind.DIFFUSION else "config.json"
    if not (folder / description).is_file():
        raise ModelSourceError(f"source {str(folder)!r}: there is no {description} in it", param="source")
    if not any(folder.glob("**/*.safetensors")):
        raise ModelSourceError(f"source {str(folder)!r}: there are no safetensors in it", param="source")


def package_path(reference: str) -> Path:
    """``name/path/inside`` of an installed package, found without importing the package."""
    name, _, inside = reference.partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelSourceError(f"source: the package {name!r} is not installed", param="source")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / inside).resolve()
    if not path.is_relative_to(root):
        raise ModelSourceError(f"source: {inside!r} lies outside the package {name!r}", param="source")
    return path


def _local(path: Path, given: str) -> ModelSource:
    if path.is_dir():
        refuse_unsafe_files(path)
        return FolderSource(path)
    if path.is_file() and path.suffix == ".gguf":
        return GGUFSource(path)
    if path.is_file():
        raise ModelSourceError(
            f"source {given!r}: {path.name} is not a GGUF file; name its folder", param="source"
        )
    raise ModelSourceError(f"source {given!r}: there is no {path}", param="source")


def refuse_unsafe_files(folder: Path) -> None:
    """Refuse a folder whose weights are pickles, or whose index points outside of it.

    A folder that has safetensors beside its pickles is fine: the pickles are never opened.
    """
    for part in (folder, *(entry for entry in sorted(folder.iterdir()) if entry.is_dir())):
        files = [entry for entry in part.iterdir() if entry.is_file()]
        pickles = [entry.name for entry in files if entry.suffix in PICKLE_SUFFIXES]
        if pickles and not any(entry.suffix == ".safetensors" for entry in files):
            raise ModelSourceError(
                f"source {folder}: {pickles[0]} is a pickle, never loaded; convert it to safetensors",
                param="source",
            )
    for index in folder.glob("**/*.index.json"):
        for name in _weight_files(index):
            if not (index.parent / name).resolve().is_relative_to(folder.resolve()):
                raise ModelSourceError(
                    f"source {folder}: {index.name} points outside the folder", param="source"
                )


def _weight_files(index: Path) -> Iterator[str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        return iter({str(name) for name in weight_map.values()})
    except (ValueError, AttributeError):
        raise ModelSourceError(f"source: {index} is not an index of weights", param="source") from None
