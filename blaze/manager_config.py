"""Settings of an :class:`blaze.manager.EngineManager`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from blaze.config import StrategyName
from blaze.engine_config import NonNegativeFloat, PositiveFloat, PositiveInt, Settings
from blaze.recovery import RecoverySettings


class ManagerConfig(Settings):
    strategy: StrategyName = "least_connections"
    request_timeout_s: PositiveFloat = 600.0  # deadline of a request without its own
    max_concurrent_requests: PositiveInt = 100  # of `dispatch_batch`, at once
    monitoring_interval_s: PositiveFloat = 30.0
    health_check_timeout_s: PositiveFloat = 10.0
    auto_recovery: bool = True
    auto_recovery_threshold: PositiveInt = 3  # failed checks in a row
    max_recovery_attempts: Annotated[int, Field(ge=1, le=100)] = 5
    recovery_backoff_s: NonNegativeFloat = 30.0  # after the first attempt; then twice as long each time
    max_recovery_backoff_s: NonNegativeFloat = 600.0
    drain_timeout_s: PositiveFloat = 30.0  # for requests to end before their engine stops, and for its stop
    max_events: PositiveInt = 256

    @property
    def recovery(self) -> RecoverySettings:
        return RecoverySettings(
            threshold=self.auto_recovery_threshold,
            max_attempts=self.max_recovery_attempts if self.auto_recovery else 0,
            backoff_s=self.recovery_backoff_s,
            max_backoff_s=self.max_recovery_backoff_s,
        )
