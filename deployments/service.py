"""The service behind the Router's HTTP and handle methods, over Serve handles."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from blaze.api.report import metrics_text, status_object
from blaze.api.service import ModelCard, Readiness
from blaze.clock import SystemClock
from blaze.config import BlazeConfig, ModelConfig
from blaze.control import Change, Control, SetAllDraining, SetNodeDraining, SetStrategy
from blaze.errors import (
    ConfigError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    NotFound,
    Overloaded,
)
from blaze.health.view import ClusterView
from blaze.reports import ModelCondition, ModelCounters, News, ReplicaCounters, RouterReport
from blaze.routing.dispatcher import Dispatcher
from blaze.routing.routed_stream import RoutedStream
from blaze.routing.settings import DispatchSettings
from blaze.routing.strategies import make_strategy
from blaze.routing.strategy import Strategy
from blaze.routing.trip import BreakerSettings
from blaze.types import Request
from deployments.data_plane import clients_are_known
from deployments.pool import RayReplicaPool

logger = logging.getLogger("ray.serve")

_PATIENCE_S = 5.0  # with the health actor, when an operator waits
_UNAVAILABLE_S = 60.0  # the hint to clients of a model that somebody has to mend


class ClusterService:
    """One Router's view of the cluster. Lives on one event loop."""

    def __init__(
        self,
        config: BlazeConfig,
        engines: Mapping[str, DeploymentHandle],
        health: DeploymentHandle,
        router_id: str,
        nodes: Callable[[], Awaitable[Collection[str]]],
    ) -> None:
        """``nodes``: the ids of the cluster's nodes, those without replicas too."""
        self._config = config
        self._health = health
        self._router_id = router_id
        self._nodes = nodes
        created = int(time.time())
        self._cards = tuple(ModelCard(m.name, m.engine, created) for m in config.models)
        self._rngs = {m.name: self._rng(m.name) for m in config.models}
        self._pools = {m.name: RayReplicaPool(engines[m.name], weight=m.weight) for m in config.models}
        self._dispatchers = {m.name: self._dispatcher(m) for m in config.models}
        self._control = Control()
        self._conditions: dict[str, ModelCondition] = {}
        self._reporting = asyncio.create_task(self._report_forever())

    def _dispatcher(self, model: ModelConfig) -> Dispatcher:
        router = self._config.router
        return Dispatcher(
            model.name,
            self._pools[model.name],
            self._strategy(model.name, router.strategy),
            clock=SystemClock(),
            rng=self._rngs[model.name],
            settings=DispatchSettings(
                max_retries=router.max_retries,
                request_timeout_s=router.request_timeout_s,
                max_queued=router.max_queued,
                max_in_flight=model.in_flight_cap,
                # Serve scales by what is in flight on replicas: what waits here it would not see.
                at_once=model.at_once if model.autoscaling is None else model.in_flight_cap,
                slow_start_s=router.slow_start_s,
                sticky_sessions=router.sticky_sessions,
                sticky_session_timeout_s=router.sticky_session_timeout_s,
                drain_timeout_s=router.drain_timeout_s,
                routers=router.replicas,
                breaker=BreakerSettings(
                    failure_threshold=router.breaker.failure_threshold,
                    success_threshold=router.breaker.success_threshold,
                    recovery_timeout_s=router.breaker.recovery_timeout,
                    max_timeout_s=router.breaker.max_timeout,
                    monitoring_window_s=router.breaker.monitoring_window,
                ),
            ),
        )

    def _rng(self, model: str) -> random.Random:
        """Each Router has draws of its own: with one seed for all they would march in step."""
        seed = self._config.router.seed
        return random.Random(None if seed is None else f"{seed}/{self._router_id}/{model}")

    def _strategy(self, model: str, name: str) -> Strategy:
        return make_strategy(name, rng=self._rngs[model], routers=self._config.router.replicas)

    def models(self) -> Sequence[ModelCard]:
        return self._cards

    def readiness(self) -> Readiness:
        missing = tuple(
            model.name
            for model in self._config.models
            if self._dispatchers[model.name].available_replicas == 0
            and (not model.may_scale_to_zero or self._is_failing(model.name))
        )
        conditions = {name: self._conditions[name] for name in missing if name in self._conditions}
        return Readiness(
            missing,
            draining=self._control.draining_all is not None,
            reasons=tuple((name, c.reason or c.state) for name, c in conditions.items()),
        )

    def _is_failing(self, model: str) -> bool:
        condition = self._conditions.get(model)
        return condition is not None and condition.state == "failing"

    async def open(self, request: Request) -> RoutedStream:
        dispatcher = self._dispatchers.get(request.model)
        if dispatcher is None:
            raise ModelNotFound(request.model)
        if self._is_failing(request.model) and not dispatcher.available_replicas:
            self._pools[request.model].wake()  # or one that was scaled to zero would never be tried again
            raise self._unavailable(request.model)
        return await dispatcher.open(request)

    def _unavailable(self, model: str) -> ModelUnavailable:
        reason = self._conditions[model].reason
        return ModelUnavailable(
            f"The model `{model}` is not available: {reason}.", retry_after_s=_UNAVAILABLE_S
        )

    async def status(self) -> dict[str, Any]:
        return status_object(self._cards, await self._view(), self.readiness(), addresses=clients_are_known())

    async def metrics(self) -> bytes:
        return metrics_text(await self._view())

    async def change(self, change: Change) -> None:
        """Numbered by the health actor, applied here at once, and by the other Routers with their next
        reports. Raises :class:`ModelNotFound`, :class:`NotFound` and :class:`Overloaded`."""
        await self._check(change)
        try:
            control: Control = await asyncio.wait_for(
                self._health.change.remote(change, self._control), timeout=_PATIENCE_S
            )
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.warning("the health actor took no change: %s: %s", type(error).__name__, error)
            raise Overloaded(
                "Changes cannot be made now; the health actor does not answer.", retry_after_s=2
            ) from error
        self._follow(control)

    async def _check(self, change: Change) -> None:
        """What is changed is there. A node whose drain is taken back may be gone."""
        tables = [dispatcher.table for dispatcher in self._dispatchers.values()]
        if isinstance(change, SetStrategy):
            if change.model not in self._dispatchers:
                raise ModelNotFound(change.model)
            try:
                self._strategy(change.model, change.strategy)
            except ConfigError as error:
                raise InvalidRequest(error.message, param="strategy") from None
        elif isinstance(change, SetNodeDraining):
            known = {name for name, _ in self._control.draining_nodes}.union(*(t.nodes for t in tables))
            if change.node not in known and change.node not in await self._nodes():
                raise NotFound(f"There is no node {change.node[:80]!r}.", param="node")
        elif isinstance(change, SetAllDraining):
            return
        elif not any(change.replica_id in table.columns.place for table in tables):
            raise NotFound(f"There is no replica {change.replica_id[:80]!r}.", param="id")

    def _follow(self, control: Control) -> None:
        before = self._control
        if control.version <= before.version:
            return
        strategies = dict(control.strategies)
        for name, dispatcher in self._dispatchers.items():
            wanted = strategies.get(name)
            if wanted is not None and wanted != dispatcher.strategy.name:
                dispatcher.strategy = self._strategy(name, wanted)
            dispatcher.follow(control)
        self._control = control

    async def _view(self) -> ClusterView:
        """The health actor's picture; while that is away, this Router's own numbers alone. An actor that has
        just come back has not heard of every Router yet."""
        report = self._report()
        try:
            view: ClusterView = await asyncio.wait_for(
                self._health.view.remote(report), timeout=2 * self._config.health.probe_period_s
            )
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.warning("the health actor does not answer: %s: %s", type(error).__name__, error)
            return ClusterView(replicas=(), reports=(report,), is_whole=False)
        return replace(view, is_whole=len(view.reports) >= self._config.router.replicas)

    def _report(self) -> RouterReport:
        models: list[ModelCounters] = []
        replicas: list[ReplicaCounters] = []
        for dispatcher in self._dispatchers.values():
            model_counters, replica_counters = dispatcher.counters()
            models.append(model_counters)
            replicas.extend(replica_counters)
        return RouterReport(self._router_id, tuple(models), tuple(replicas), self._control)

    async def _report_forever(self) -> None:
        """Two reports a probe period, and the news that comes back; one that cannot be delivered must not
        stop the next."""
        period_s = min(0.5, self._config.health.probe_period_s / 2)
        failing = False
        while True:
            await asyncio.sleep(period_s)
            try:
                news: News = await asyncio.wait_for(
                    self._health.report.remote(self._report()), timeout=10 * period_s
                )
                self._take(news)
                failing = False
            except asyncio.CancelledError:
                raise
            except Exception as error:
                if not failing:
                    logger.warning("reports are not delivered: %s: %s", type(error).__name__, error)
                failing = True
                for dispatcher in self._dispatchers.values():
                    dispatcher.table.set_peers(None)

    def _take(self, news: News) -> None:
        self._follow(news.control)
        self._conditions = {condition.model: condition for condition in news.conditions}
        peers = dict(news.peers)
        for dispatcher in self._dispatchers.values():
            dispatcher.table.set_peers(peers)
            dispatcher.set_suspects(news.suspects, news.condemned)
            known = dispatcher.table.columns.place
            dispatcher.prefixes.learn((id, digest) for id, digest in news.prefixes if id in known)
        for name, dispatcher in self._dispatchers.items():
            if self._is_failing(name) and not dispatcher.available_replicas:
                dispatcher.refuse(self._unavailable(name), for_good=False)
