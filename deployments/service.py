"""The service behind the Router's HTTP and handle methods, over Serve handles."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from blaze.api.report import metrics_text, status_object
from blaze.api.service import ModelCard, Readiness
from blaze.clock import SystemClock
from blaze.config import BlazeConfig, ModelConfig
from blaze.errors import ModelNotFound
from blaze.health.supervisor import ClusterView
from blaze.reports import ModelCounters, ReplicaCounters, RouterReport
from blaze.routing.dispatcher import Dispatcher, DispatchSettings, RoutedStream
from blaze.routing.strategies import make_strategy
from blaze.types import Request
from deployments.pool import RayReplicaPool

logger = logging.getLogger("ray.serve")


class ClusterService:
    """One Router's view of the cluster. Lives on one event loop."""

    def __init__(
        self,
        config: BlazeConfig,
        engines: Mapping[str, DeploymentHandle],
        health: DeploymentHandle,
        router_id: str,
    ) -> None:
        self._config = config
        self._health = health
        self._router_id = router_id
        created = int(time.time())
        self._cards = tuple(ModelCard(m.name, m.engine, created) for m in config.models)
        self._dispatchers = {m.name: self._dispatcher(m, engines[m.name]) for m in config.models}
        self._reporting = asyncio.create_task(self._report_forever())

    def _dispatcher(self, model: ModelConfig, handle: DeploymentHandle) -> Dispatcher:
        router = self._config.router
        # Each Router has draws of its own: with one seed for all they would march in step.
        rng = random.Random(None if router.seed is None else f"{router.seed}/{self._router_id}")
        return Dispatcher(
            model.name,
            RayReplicaPool(handle, weight=model.weight),
            make_strategy(router.strategy, rng=rng, routers=router.replicas),
            clock=SystemClock(),
            rng=rng,
            settings=DispatchSettings(
                max_retries=router.max_retries,
                request_timeout_s=router.request_timeout_s,
                max_queued=router.max_queued,
                max_in_flight=model.in_flight_cap,
            ),
        )

    def models(self) -> Sequence[ModelCard]:
        return self._cards

    def readiness(self) -> Readiness:
        return Readiness(
            missing=tuple(
                model.name
                for model in self._config.models
                if not model.may_scale_to_zero and self._dispatchers[model.name].available_replicas == 0
            )
        )

    async def open(self, request: Request) -> RoutedStream:
        dispatcher = self._dispatchers.get(request.model)
        if dispatcher is None:
            raise ModelNotFound(request.model)
        return await dispatcher.open(request)

    async def status(self) -> dict[str, Any]:
        return status_object(self._cards, await self._view(), self.readiness())

    async def metrics(self) -> bytes:
        return metrics_text(await self._view())

    async def _view(self) -> ClusterView:
        """The health actor's picture; while that is away, this Router's own numbers alone."""
        report = self._report()
        try:
            view: ClusterView = await asyncio.wait_for(
                self._health.view.remote(report), timeout=2 * self._config.health.probe_period_s
            )
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.warning("the health actor does not answer: %s: %s", type(error).__name__, error)
            return ClusterView(replicas=(), reports=(report,))
        return view

    def _report(self) -> RouterReport:
        models: list[ModelCounters] = []
        replicas: list[ReplicaCounters] = []
        for dispatcher in self._dispatchers.values():
            model_counters, replica_counters = dispatcher.counters()
            models.append(model_counters)
            replicas.extend(replica_counters)
        return RouterReport(self._router_id, tuple(models), tuple(replicas))

    async def _report_forever(self) -> None:
        """A report every probe period; one that cannot be delivered must not stop the next."""
        period_s = self._config.health.probe_period_s
        failing = False
        while True:
            await asyncio.sleep(period_s)
            try:
                await asyncio.wait_for(self._health.report.remote(self._report()), timeout=10 * period_s)
                failing = False
            except asyncio.CancelledError:
                raise
            except Exception as error:
                if not failing:
                    logger.warning("reports are not delivered: %s: %s", type(error).__name__, error)
                failing = True
