"""Which deployments a change of the config replaces: those whose own arguments have changed.

Serve gives all deployments of an application one version, a hash of the application's ``args``: whatever
is changed there restarts every model. Here each deployment has a version made from what it is bound to,
the code, and the files of its model, so that a new revision of one model leaves the others alone, and
another number of replicas restarts none.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PrivateAttr
from ray.serve import Application, Deployment
from ray.serve._private.config import DeploymentConfig

from blaze.config import BlazeConfig, ModelConfig, ResourcesConfig
from blaze.engine_config import DiffusionConfig, LLMConfig, SimulatorConfig
from blaze.models.sources import HubSource, parse_source
from blaze.types import EngineKind

_PACKAGES = (Path(__file__).parent, Path(__file__).parents[1] / "blaze")
_CODE = frozenset({".py", ".cpp", ".h", ".hpp"})


class _OwnVersion(DeploymentConfig):  # type: ignore[misc]  # Ray ships no types
    """Serve writes the application's version over a deployment's as it sends it to the controller."""

    _own: str = PrivateAttr(default="")

    def to_proto(self) -> Any:
        proto = super().to_proto()
        proto.version = self._own
        return proto


def bind(deployment: Deployment, *arguments: object, files: str = "") -> Application:
    """Binds the deployment, with a version made of all of that and of :func:`files_of` its model."""
    config = deployment._deployment_config
    own = _OwnVersion.model_construct(**{name: getattr(config, name) for name in type(config).model_fields})
    own._own = _digest((code_version(), deployment.name, files, *map(_described, arguments)))
    deployment._deployment_config = own
    return deployment.bind(*arguments)


def _described(argument: object) -> str:
    if isinstance(argument, BaseModel):
        return argument.model_dump_json()
    if isinstance(argument, Application):
        return f"the handle of {argument._bound_deployment.name}"
    if isinstance(argument, Mapping):
        return json.dumps({str(key): _described(value) for key, value in argument.items()}, sort_keys=True)
    return repr(argument)


def as_loaded(model: ModelConfig) -> ModelConfig:
    """What the replicas of a model are made from: not how many they are, nor how they are used."""
    return model.model_copy(
        update={
            "replicas": None,
            "autoscaling": None,
            "weight": 1.0,
            "max_in_flight": None,
            "max_surge_percent": 0,
        }
    )


def as_routed(config: BlazeConfig) -> BlazeConfig:
    """What the Routers are made from: not how many replicas there are, nor what they load."""
    return config.model_copy(update={"models": tuple(map(_routed, config.models))})


def _routed(model: ModelConfig) -> ModelConfig:
    at_once = model.at_once
    options: Mapping[EngineKind, BaseModel] = {
        EngineKind.LLM: LLMConfig(max_batch_size=at_once, max_batch_tokens=max(512, at_once)),
        EngineKind.DIFFUSION: DiffusionConfig(max_batch_size=at_once),
        EngineKind.SIMULATOR: SimulatorConfig(slots=at_once),
    }
    return model.model_copy(
        update={
            "replicas": None,
            "resources": ResourcesConfig(),
            "source": None,
            "revision": None,
            "restart": None,
            "max_surge_percent": 0,
            model.engine.value: options[model.engine],
        }
    )


def files_of(model: ModelConfig) -> str:
    """Names, sizes and times of a model's files: weights that are written over are other weights. Of a hub
    repository its revision says it."""
    if model.source is None:
        return ""
    source = parse_source(model.source, revision=model.revision)
    if isinstance(source, HubSource):
        return ""
    files = (
        sorted(p for p in source.path.rglob("*") if p.is_file()) if source.path.is_dir() else [source.path]
    )
    return json.dumps([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])


@functools.cache
def code_version() -> str:
    """Of Blaze as it is installed here."""
    files = sorted(p for package in _PACKAGES for p in package.rglob("*") if p.suffix in _CODE)
    return _digest(text for p in files for text in (p.name, p.read_text(encoding="utf-8")))


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8"))
        digest.update(b"\0")
    return digest.hexdigest()
