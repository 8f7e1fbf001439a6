"""Engines for this process, from what a config would say of their model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from blaze.clock import Clock
from blaze.config import ModelConfig, cache_dir
from blaze.config_errors import describe
from blaze.engines.base import Engine
from blaze.engines.openmp import share_cores
from blaze.engines.simulator import SimulatorEngine
from blaze.errors import ConfigError
from blaze.local_replica import EngineMaker
from blaze.types import EngineKind

_OF_THE_MODEL = ("revision", "weight", "max_in_flight")  # options that are not the engine's


def model_config(
    name: str, engine: str, source: str | Path | None, replicas: int, options: Mapping[str, Any]
) -> ModelConfig:
    """The model's entry as a config would have it. Raises :class:`ConfigError` naming every wrong field."""
    entry: dict[str, Any] = {
        "name": name,
        "engine": engine,
        "source": None if source is None else str(source),
        "replicas": replicas,
        "resources": {"num_cpus": 0},  # nobody rations them here: all cores, unless `threads` says otherwise
        engine: {key: value for key, value in options.items() if key not in _OF_THE_MODEL},
    }
    entry |= {key: options[key] for key in _OF_THE_MODEL if key in options}
    try:
        return ModelConfig.model_validate_json(json.dumps(entry, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


def engine_maker(config: ModelConfig, clock: Clock) -> EngineMaker:
    if config.engine is EngineKind.SIMULATOR:
        return lambda rank: SimulatorEngine(config.simulator_options, rank=rank, clock=clock)
    return lambda _rank: _with_model(config, clock)


def _with_model(config: ModelConfig, clock: Clock) -> Engine:
    share_cores()
    # Imported when such a model is wanted: torch, transformers and diffusers are heavy.
    from blaze.models.sources import parse_source

    source = parse_source(config.source or "", revision=config.revision)
    threads, cache = config.threads, cache_dir()
    if config.engine is EngineKind.LLM:
        from blaze.engines.llm.engine import LLMEngine

        return LLMEngine(source, config.llm_options, threads=threads, cache=cache, clock=clock)
    from blaze.engines.diffusion.engine import DiffusionEngine

    return DiffusionEngine(source, config.diffusion_options, threads=threads, cache=cache, clock=clock)
