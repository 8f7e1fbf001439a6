"""Engines in one process behind the same dispatcher as on a cluster, without Ray: for notebooks and tests.

>>> import blaze
>>> async with blaze.EngineManager() as manager:
...     await manager.create("sim", engine="simulator", replicas=2)
...     answer = await manager.execute("sim", "generate", {"prompt": "Hello"})
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
from pydantic import ValidationError

from blaze.api.report import metrics_text, status_object
from blaze.api.service import ModelCard, Readiness
from blaze.clock import Clock, SystemClock
from blaze.config_errors import describe
from blaze.engines.base import Engine
from blaze.engines.operations import answer_all, translate
from blaze.errors import ConfigError, EnvironmentProblem, ModelNotFound, NotFound, RemoteError
from blaze.health.view import ClusterView, ReplicaHealth
from blaze.local_engines import engine_maker, model_config
from blaze.local_model import LocalModel
from blaze.local_pool import LocalPool
from blaze.local_replica import EngineMaker, EventLog, LocalEvent, Surroundings
from blaze.manager_config import ManagerConfig
from blaze.reports import RouterReport
from blaze.results import Answer, Batch, Result, whole
from blaze.routing.dispatcher import Dispatcher
from blaze.routing.settings import DispatchSettings
from blaze.routing.strategies import make_strategy
from blaze.types import EngineKind, Event, Failed, ReplicaId, Request

logger = logging.getLogger(__name__)


class EngineManager:
    """All methods are called on one event loop. Errors are :class:`blaze.errors.BlazeError`."""

    def __init__(
        self, *, clock: Clock | None = None, rng: random.Random | None = None, **settings: Any
    ) -> None:
        """``settings``: fields of :class:`ManagerConfig`. Raises :class:`ConfigError`."""
        try:
            self._config = ManagerConfig.model_validate(settings, strict=True)
        except ValidationError as error:
            raise ConfigError(describe(error)) from None
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()
        self._log = EventLog(self._clock, most=self._config.max_events)
        self._since = int(time.time())
        self._models: dict[str, LocalModel] = {}
        self._at_once = asyncio.Semaphore(self._config.max_concurrent_requests)
        self._monitoring: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.shutdown()

    # --- Engines -------------------------------------------------------------------------------------

    async def create(
        self,
        name: str,
        *,
        engine: str = "llm",
        source: str | Path | None = None,
        replicas: int = 1,
        **options: Any,
    ) -> tuple[ReplicaId, ...]:
        """Load a model into engines of its own. Requests for it are taken from now on, and wait meanwhile.

        ``options``: of the engine, as in its section of a config, and ``revision``, ``weight``,
        ``max_in_flight``. Raises :class:`ConfigError`; when one engine does not start, none is left.
        """
        config = model_config(name, engine, source, replicas, options)
        model = self._add(config.name, config.engine, config.in_flight_cap, config.at_once)
        try:
            for _ in range(replicas):
                await model.place(engine_maker(config, self._clock), weight=config.weight).start()
        except BaseException:
            await self._remove(model)
            raise
        return tuple(model.replicas)

    def register(
        self,
        name: str,
        engine: Engine,
        *,
        rebuild: Callable[[], Engine] | None = None,
        weight: float = 1.0,
    ) -> ReplicaId:
        """One more engine of that name, which is started already and belongs to the manager from now on.

        ``rebuild``: a new engine, not started, for when this one has failed; without it, it is not
        recovered. Raises :class:`ConfigError`.
        """
        model_config(name, EngineKind.SIMULATOR, None, 1, {"weight": weight})  # the rules of any model
        usual = DispatchSettings()
        model = self._models.get(name) or self._add(name, engine.kind, usual.max_in_flight, usual.at_once)
        if model.kind is not engine.kind:
            raise ConfigError(f"name: {name} has engines of another kind, {model.kind.value}", param="name")
        make: EngineMaker | None = None if rebuild is None else lambda _rank: rebuild()
        replica = model.place(make, weight=weight)
        replica.adopt(engine)
        return replica.info.id

    async def unregister(self, name: str) -> None:
        """A model, or one replica by its id: what runs there comes to an end, then it is stopped.

        Where that takes longer than ``drain_timeout_s``, the rest fails, or goes on on another replica.
        """
        if name in self._models:
            await self._remove(self._models[name])
            return
        for model in self._models.values():
            replica = model.find(name)
            if replica is not None:
                await (self._remove(model) if len(model.replicas) == 1 else model.remove(replica))
                return
        raise NotFound(f"There is no model and no replica {name[:80]!r}.", param="name")

    async def shutdown(self) -> None:
        """End everything, as ``unregister`` does; safe to repeat. The manager is not used again."""
        self._closed = True
        if self._monitoring is not None:
            self._monitoring.cancel()
            await asyncio.wait([self._monitoring])
        await asyncio.gather(*(self._remove(model) for model in tuple(self._models.values())))

    def _add(self, name: str, kind: EngineKind, max_in_flight: int, at_once: int) -> LocalModel:
        if self._closed:
            raise EnvironmentProblem("The manager has been shut down.")
        if name in self._models:
            raise ConfigError(f"name: {name} is taken", param="name")
        if self._monitoring is None:
            self._monitoring = asyncio.create_task(self._monitor_forever())
        pool = LocalPool()
        around = Surroundings(
            pool=pool,
            log=self._log,
            clock=self._clock,
            recovery=self._config.recovery,
            check_timeout_s=self._config.health_check_timeout_s,
            drain_timeout_s=self._config.drain_timeout_s,
        )
        settings = DispatchSettings(
            request_timeout_s=self._config.request_timeout_s,
            # A batch alone never fills the queue.
            max_queued=max(DispatchSettings().max_queued, self._config.max_concurrent_requests),
            max_in_flight=max_in_flight,
            at_once=at_once,
        )
        strategy = make_strategy(self._config.strategy, rng=self._rng)
        dispatcher = Dispatcher(name, pool, strategy, clock=self._clock, rng=self._rng, settings=settings)
        model = self._models[name] = LocalModel(name, kind, dispatcher, around)
        return model

    async def _remove(self, model: LocalModel) -> None:
        if self._models.get(model.name) is model:
            del self._models[model.name]
        await model.close()

    # --- Requests ------------------------------------------------------------------------------------

    async def dispatch(self, request: Request) -> Answer:
        """The whole answer of the model that the request names."""
        async with self._model(request.model).answer(request) as batches:
            return await whole(request, batches)

    async def stream(self, request: Request) -> AsyncGenerator[Event]:
        """The events one by one; raises where the terminal event is ``Failed``. Closing it cancels."""
        async with self._model(request.model).answer(request) as batches:
            async for events in batches:
                for event in events:
                    if isinstance(event, Failed):
                        raise RemoteError(event.error)
                    yield event

    async def dispatch_batch(self, requests: Sequence[Request]) -> Batch:
        """All of them, at most ``max_concurrent_requests`` at once; none takes another one down."""
        return await answer_all(requests, self.dispatch, at_once=self._at_once)

    async def execute(self, name: str, operation: str, params: Mapping[str, object]) -> Result:
        """One of the model's operations by name, see :mod:`blaze.engines.operations`."""
        call = translate(self._model(name).kind, operation, params, model=name)
        if call.is_batch:
            return await self.dispatch_batch(call.requests)
        return await self.dispatch(call.requests[0])

    def best_engine(self, operation: str, *, kind: EngineKind | None = None) -> str | None:
        """The model with the least load per ready engine, of those that offer the operation now."""
        fit = [m for m in self._models.values() if kind in (None, m.kind) and m.offers(operation)]
        return min(fit, key=lambda model: model.load).name if fit else None

    def _model(self, name: str) -> LocalModel:
        model = self._models.get(name)
        if model is None:
            raise ModelNotFound(name)
        return model

    # --- How they are --------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """As a cluster's; the engines' own numbers are those of their last check."""
        cards = [ModelCard(model.name, model.kind, self._since) for model in self._models.values()]
        missing = tuple(m.name for m in self._models.values() if not m.dispatcher.available_replicas)
        return status_object(cards, self._view(), Readiness(missing))

    def metrics(self) -> bytes:
        """As a cluster's, in Prometheus' text format."""
        return metrics_text(self._view())

    @property
    def events(self) -> tuple[LocalEvent, ...]:
        """What was found of engines and decided about them lately, oldest first."""
        return self._log.events()

    async def health(self) -> tuple[ReplicaHealth, ...]:
        """All engines, checked now and all at once. What follows from it is left to the monitoring."""
        replicas = [replica for model in self._models.values() for replica in model.replicas.values()]
        await asyncio.gather(*(replica.check() for replica in replicas))
        return self._view().replicas

    async def monitor(self) -> None:
        """One round: check all engines, take failed ones out, and build those again whose time has come.

        The manager does this itself every ``monitoring_interval_s``.
        """
        await asyncio.gather(*(model.watch() for model in tuple(self._models.values())))

    async def _monitor_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.monitoring_interval_s)
            try:
                await self.monitor()
            except Exception:
                logger.exception("a round of monitoring failed")

    def _view(self) -> ClusterView:
        memory_bytes = psutil.Process().memory_info().rss  # of the process: all engines share it
        models = tuple(self._models.values())
        counters = [model.dispatcher.counters() for model in models]
        return ClusterView(
            replicas=tuple(
                replica.health(model.name, memory_bytes)
                for model in models
                for replica in model.replicas.values()
            ),
            reports=(
                RouterReport(
                    "local",
                    models=tuple(model for model, _ in counters),
                    replicas=tuple(replica for _, replicas in counters for replica in replicas),
                ),
            ),
        )
