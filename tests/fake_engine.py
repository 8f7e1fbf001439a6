"""An engine that fails when it is told to; until then it is the simulator, and held to its contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from blaze.clock import Clock
from blaze.engine_config import SimulatorConfig
from blaze.engines.simulator import SimulatorEngine
from blaze.reports import EngineStatus
from blaze.types import Events, Request


class FakeEngine(SimulatorEngine):
    """Answers at once with one token, unless ``options`` of the simulator say otherwise."""

    def __init__(self, *, clock: Clock | None = None, **options: Any) -> None:
        super().__init__(
            SimulatorConfig(**{"ttft_ms": 0, "inter_token_ms": 0, "tokens": 1} | options), clock=clock
        )
        self.requests: list[Request] = []
        self.starts = 0
        self.stops = 0
        self.checks = 0
        self.failed: str | None = None  # what its status says
        self.check_raises: Exception | None = None
        self.answers_checks = asyncio.Event()
        self.answers_checks.set()
        self.start_raises: Exception | None = None
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.run_raises: Exception | None = None
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.stop_raises: Exception | None = None

    async def start(self) -> None:
        self.starts += 1
        await self.may_start.wait()
        if self.start_raises is not None:
            raise self.start_raises
        await super().start()

    async def stop(self) -> None:
        self.stops += 1
        await super().stop()
        if self.stop_raises is not None:
            raise self.stop_raises

    async def get_health_status(self) -> EngineStatus:
        self.checks += 1
        await self.answers_checks.wait()
        if self.check_raises is not None:
            raise self.check_raises
        status = await super().get_health_status()
        return status if self.failed is None else replace(status, state="failed", detail=self.failed)

    async def run(self, request: Request) -> AsyncGenerator[Events]:
        self.requests.append(request)
        if self.run_raises is not None:
            raise self.run_raises
        await self.may_answer.wait()
        async with aclosing(super().run(request)) as batches:
            async for events in batches:
                yield events
