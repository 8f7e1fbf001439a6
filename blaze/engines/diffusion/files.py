"""The files of a pipeline: brought here, and looked through before any of them is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blaze.engine_config import DiffusionConfig
from blaze.errors import EnvironmentProblem, ModelSourceError
from blaze.models.memory import pipeline_bytes
from blaze.models.sources import FolderSource, GGUFSource, HubSource, ModelSource

# Where the classes of components come from. Anything else would be code that came with the weights.
_LIBRARIES = frozenset({"diffusers", "transformers"})


def local_folder(source: ModelSource) -> Path:
    """Blocking: files of a hub source are downloaded, safetensors only and no code."""
    from diffusers import DiffusionPipeline

    if isinstance(source, FolderSource):
        return source.path
    if isinstance(source, GGUFSource):
        raise ModelSourceError(
            "source: a diffusion model is a folder or a hub id, not a GGUF file", param="source"
        )
    assert isinstance(source, HubSource)
    try:
        return Path(
            DiffusionPipeline.download(
                source.repo, revision=source.revision, use_safetensors=True, trust_remote_code=False
            )
        )
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ModelSourceError(f"source {source.repo!r} cannot be loaded: {error}", param="source") from error


def read_index(folder: Path) -> Mapping[str, Any]:
    """``model_index.json``: the class of the pipeline, and of each component.

    Raises :class:`ModelSourceError` when it is missing, or asks for classes that are not the libraries' own.
    """
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"source {str(folder)!r}: {path.name}: {error}", param="source") from error
    if not isinstance(index, dict):
        raise ModelSourceError(f"source {str(folder)!r}: {path.name} is no description", param="source")
    _check_pipeline_class(folder, index.get("_class_name"))
    for name, entry in index.items():
        if isinstance(entry, list) and entry and entry[0] is not None:
            _check_library(folder, name, entry[0])
    return index


def _check_pipeline_class(folder: Path, name: object) -> None:
    import diffusers

    # A list names a file with the code of a custom pipeline, and then the class in it.
    known = isinstance(name, str) and name in dir(diffusers) and name.endswith("Pipeline")
    if not known:
        raise ModelSourceError(
            f"source {str(folder)!r}: {name!r} is no pipeline of diffusers; code that comes with a model "
            "is never run",
            param="source",
        )


def _check_library(folder: Path, component: str, library: object) -> None:
    from diffusers import pipelines

    known = isinstance(library, str) and (library in _LIBRARIES or library in dir(pipelines))
    if not known:
        raise ModelSourceError(
            f"source {str(folder)!r}: {component} is of {library!r}, not of diffusers or transformers; code "
            "that comes with a model is never run",
            param="source",
        )


def check_fits(folder: Path, options: DiffusionConfig, dtype: str, free: int) -> None:
    """Raises :class:`EnvironmentProblem` when the weights alone take more than ``free`` bytes."""
    parts = pipeline_bytes(folder, options, dtype)
    needed = sum(parts.values())
    if needed > free:
        largest = max(parts, key=lambda name: parts[name])
        raise EnvironmentProblem(
            f"source {str(folder)!r}: its weights take {needed / 2**20:,.0f} MiB in {dtype} "
            f"({largest}: {parts[largest] / 2**20:,.0f} MiB), and {free / 2**20:,.0f} MiB are free"
        )
