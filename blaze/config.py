"""Settings: the only reader of YAML and of the environment.

``serve_config.yaml`` is an ordinary Ray Serve config; what Blaze reads is the ``args`` of its
application, validated here as :class:`BlazeConfig`. Every error names the field it is about, with the
path it has in the file, e.g. ``models[1].llm.max_batch_size``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from blaze.config_errors import describe
from blaze.control import MOST_WEIGHT
from blaze.engine_config import (
    DiffusionConfig,
    LLMConfig,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Settings,
    SimulatorConfig,
)
from blaze.errors import ConfigError
from blaze.key_config import ApiKeyConfig, check_unique
from blaze.types import EngineKind

APP_NAME = "blaze"
ROUTER_NAME = "Router"  # of its deployment
APP_IMPORT_PATH = "deployments.app:build_app"

StrategyName = Literal[
    "round_robin",
    "weighted_round_robin",
    "least_connections",
    "least_response_time",
    "ip_hash",
    "adaptive",
]
STRATEGIES: tuple[str, ...] = get_args(StrategyName)


class BreakerConfig(Settings):
    failure_threshold: PositiveInt = 5  # failures in a row
    success_threshold: PositiveInt = 2  # probes that have to succeed
    recovery_timeout: PositiveFloat = 1.0  # seconds: the first time; then twice as long each time
    max_timeout: PositiveFloat = 60.0  # seconds
    monitoring_window: PositiveFloat = 10.0  # seconds, in which half of at least 10 requests failing trips it

    @model_validator(mode="after")
    def _timeouts_in_order(self) -> BreakerConfig:
        if self.recovery_timeout > self.max_timeout:
            raise ValueError(
                f"recovery_timeout {self.recovery_timeout:g} is above max_timeout {self.max_timeout:g}"
            )
        return self


class RouterConfig(Settings):
    strategy: StrategyName = "least_connections"
    replicas: PositiveInt = 1
    max_retries: Annotated[int, Field(ge=0)] = 2  # further attempts, before the first token or image
    request_timeout_s: PositiveFloat = 600.0  # deadline of a request without its own
    max_queued: Annotated[int, Field(ge=0)] = 256  # waiting requests per model and Router
    max_body_bytes: PositiveInt = 16 * 1024 * 1024
    api_keys: tuple[ApiKeyConfig, ...] = ()  # without any, everybody may do everything
    trusted_proxies: tuple[str, ...] = ()  # addresses and networks whose X-Forwarded-For is believed
    access_log: bool = False  # a line per request in the Router's log; /metrics counts them either way
    seed: int | None = None  # of the generator behind ties and starting points; None: from the system
    breaker: BreakerConfig = BreakerConfig()
    slow_start_s: NonNegativeFloat = 30.0  # a replica that has just come gets its share little by little
    sticky_sessions: bool = False  # requests of an x-session-id stay with one replica
    sticky_session_timeout_s: PositiveFloat = 300.0
    drain_timeout_s: NonNegativeFloat = 30.0  # then what runs on a draining replica goes on elsewhere

    @field_validator("api_keys")
    @classmethod
    def _are_unique(cls, keys: tuple[ApiKeyConfig, ...]) -> tuple[ApiKeyConfig, ...]:
        check_unique(keys)
        return keys

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for text in proxies:
            try:
                ip_network(text)
            except ValueError:
                raise ValueError(f"{text!r} is not an address or a network") from None
        return proxies


class HealthConfig(Settings):
    probe_period_s: PositiveFloat = 1.0
    # Missed in a row: suspect. At least two, for a heartbeat is always a little later than one period.
    missed_probes: Annotated[int, Field(ge=2)] = 3
    stall_after_s: PositiveFloat = 30.0

    @model_validator(mode="after")
    def _suspect_before_unhealthy(self) -> HealthConfig:
        least_s = (self.missed_probes + 1) * self.probe_period_s
        if self.stall_after_s <= least_s:
            raise ValueError(
                f"stall_after_s {self.stall_after_s:g} must be above {least_s:g}, which is "
                "(missed_probes + 1) * probe_period_s: or replicas that are well would be restarted"
            )
        return self


class AutoscalingConfig(Settings):
    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: PositiveInt = 1
    target_in_flight: PositiveFloat = 8.0  # requests in flight per replica that scaling aims at
    upscale_delay_s: NonNegativeFloat = 5.0
    downscale_delay_s: NonNegativeFloat = 300.0

    @model_validator(mode="after")
    def _bounds_in_order(self) -> AutoscalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class ResourcesConfig(Settings):
    num_cpus: NonNegativeFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0
    memory: NonNegativeFloat | None = None  # bytes


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-/:]{0,127}")


class ModelConfig(Settings):
    name: str
    engine: EngineKind
    source: str | None = None
    revision: str | None = None  # of a hub source
    replicas: PositiveInt | None = None
    autoscaling: AutoscalingConfig | None = None
    resources: ResourcesConfig = ResourcesConfig()
    weight: Annotated[float, Field(ge=0, le=MOST_WEIGHT, allow_inf_nan=False)] = 1.0
    max_in_flight: PositiveInt | None = None  # per replica; None: twice what the engine runs at once
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] = 25  # more replicas while they are replaced
    restart: str | None = None  # any text: another one replaces the replicas
    llm: LLMConfig | None = None
    diffusion: DiffusionConfig | None = None
    simulator: SimulatorConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name[:80]!r} must be letters, digits and . _ - / : (at most 128)")
        for kind in EngineKind:
            if kind is not self.engine and getattr(self, kind.value) is not None:
                raise ValueError(
                    f"{kind.value}: options of another engine; this model's engine is {self.engine.value}"
                )
        if self.engine is EngineKind.SIMULATOR:
            if self.source is not None:
                raise ValueError("source: the simulator has no model to load")
        elif not self.source:
            raise ValueError(f"source: needed by the {self.engine.value} engine")
        if self.replicas is not None and self.autoscaling is not None:
            raise ValueError("replicas and autoscaling exclude each other")
        if self.autoscaling is not None and self.autoscaling.target_in_flight >= self.in_flight_cap:
            raise ValueError(
                f"autoscaling.target_in_flight {self.autoscaling.target_in_flight:g} must be below "
                f"max_in_flight {self.in_flight_cap}: no replica would ever exceed it"
            )
        return self

    @property
    def llm_options(self) -> LLMConfig:
        return self.llm or LLMConfig()

    @property
    def diffusion_options(self) -> DiffusionConfig:
        return self.diffusion or DiffusionConfig()

    @property
    def simulator_options(self) -> SimulatorConfig:
        return self.simulator or SimulatorConfig()

    @property
    def in_flight_cap(self) -> int:
        """How many requests one Router has in flight on one replica at the most."""
        return 2 * self.at_once if self.max_in_flight is None else self.max_in_flight

    @property
    def at_once(self) -> int:
        """How many requests a replica works on at the same time."""
        return {
            EngineKind.LLM: self.llm_options.max_batch_size,
            EngineKind.DIFFUSION: self.diffusion_options.max_batch_size,
            EngineKind.SIMULATOR: self.simulator_options.slots,
        }[self.engine]

    @property
    def may_scale_to_zero(self) -> bool:
        return self.autoscaling is not None and self.autoscaling.min_replicas == 0

    @property
    def threads(self) -> int:
        """Math threads of one replica (Ray would set 1 for a fractional ``num_cpus``)."""
        chosen = self.llm_options.threads if self.engine is EngineKind.LLM else self.diffusion_options.threads
        if chosen is not None:
            return chosen
        cpus = int(self.resources.num_cpus)
        return cpus if cpus >= 1 else _cores_at_hand()


class BlazeConfig(Settings):
    router: RouterConfig = RouterConfig()
    health: HealthConfig = HealthConfig()
    models: Annotated[tuple[ModelConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_are_unique(self) -> BlazeConfig:
        seen: set[str] = set()
        for model in self.models:
            if model.name in seen:
                raise ValueError(f"models: the name {model.name!r} is given twice")
            seen.add(model.name)
        return self


def parse_args(args: object) -> BlazeConfig:
    """Validate the ``args`` of the application. Raises :class:`ConfigError` naming every wrong field."""
    # Through JSON, where strict types still take a list for a tuple and an integer for a float: "3" and
    # true are no numbers.
    try:
        return BlazeConfig.model_validate_json(json.dumps(args, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


def load_serve_config(path: Path) -> dict[str, Any]:
    """Read a Serve config file and check that it deploys Blaze.

    Returns the file as a mapping, unchanged: it is sent to Serve as it is. Raises :class:`ConfigError`.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(loaded, dict) or not isinstance(loaded.get("applications"), list):
        raise ConfigError(f"{path}: applications: a Serve config has a list of applications here")
    blaze_application(loaded)
    return loaded


def blaze_application(serve_config: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of ``applications`` that is Blaze. Raises :class:`ConfigError` when there is none."""
    applications = serve_config["applications"]
    for application in applications:
        if isinstance(application, dict) and application.get("import_path") == APP_IMPORT_PATH:
            return application
    raise ConfigError(f"applications: none has import_path {APP_IMPORT_PATH!r}")


def _cores_at_hand() -> int:
    """Those that this process may run on: in a container often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_dir() -> Path:
    """Home of converted models: ``BLAZE_CACHE``, else ``blaze`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    chosen = os.environ.get("BLAZE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blaze"


def state_dir() -> Path:
    """Where `blaze up` leaves word of the cluster that it runs, for the other commands."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "blaze"
