"""One Router's service between the engines and the health actor: what operators change, and what it hears."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Generic, ParamSpec, TypeVar

import pytest

from blaze.config import parse_args
from blaze.control import (
    NO_CHANGES,
    ActOnBreaker,
    Change,
    Control,
    Drain,
    SetAllDraining,
    SetDraining,
    SetNodeDraining,
    SetStrategy,
    SetWeight,
)
from blaze.errors import (
    BlazeError,
    Draining,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    NotFound,
    Overloaded,
)
from blaze.health.view import ClusterView
from blaze.prompt_chain import packed, prompt_chain
from blaze.reports import ModelCondition, ModelCounters, News, PeerLoad, ReplicaCounters, RouterReport
from blaze.routing.dispatcher import Dispatcher
from blaze.routing.replica import ReplicaInfo
from blaze.types import ReplicaId, Request, TextPrompt
from deployments import pinned_state
from deployments.service import ClusterService
from tests.fakes import FakeCall, answer
from tests.samples import collect, text_request
from tests.waiting import until

Params = ParamSpec("Params")
Answer = TypeVar("Answer")

REPLICAS = {"m": ("a", "b", "c"), "n": ("x", "y")}
NODES = {"a": "one", "b": "two", "c": "two", "x": "one", "y": "one"}
NOTHING_NEW = News(NO_CHANGES, (), ())


class Method(Generic[Params, Answer]):
    """One method of a Serve handle."""

    def __init__(self, call: Callable[Params, Awaitable[Answer]]) -> None:
        self.remote = call


class FakeEngines:
    """A Serve handle to a model's replicas, with Serve's request router; answers "ok" wherever it is sent."""

    app_name = "app"

    def __init__(self, model: str, called: list[ReplicaId]) -> None:
        self.deployment_name = model
        self._called = called
        live = tuple(ReplicaInfo(replica_id, node=NODES[replica_id]) for replica_id in REPLICAS[model])
        pinned_state.live_sets.publish(f"app#{model}", live)

    def options(self, **_options: object) -> FakeEngines:
        return self

    def remote(self, *_request: Request, blaze_pin: ReplicaId) -> FakeCall | asyncio.Future[None]:
        self._called.append(blaze_pin)
        if blaze_pin == pinned_state.ANY:  # there is none, or nobody would ask for any
            return asyncio.get_running_loop().create_future()
        return FakeCall(answer())


class FakeHealth:
    """A Serve handle to the health actor, which numbers changes and tells the news that a test sets."""

    def __init__(self) -> None:
        self.news = NOTHING_NEW
        self.changes: list[Change] = []
        self.num_reports = 0
        self.error: Exception | None = None
        self.silent = False
        self.change = Method(self._change)
        self.report = Method(self._report)
        self.view = Method(self._view)
        self.shown = RouterReport("nobody", (), ())  # the one that came with the last question
        self.others: tuple[RouterReport, ...] = ()

    async def _change(self, change: Change, known: Control) -> Control:
        self.changes.append(change)
        await self._there()
        return known.after(change)

    async def _report(self, _report: RouterReport) -> News:
        self.num_reports += 1
        await self._there()
        return self.news

    async def _view(self, report: RouterReport) -> ClusterView:
        self.shown = report
        await self._there()
        return ClusterView((), (report, *self.others))

    async def _there(self) -> None:
        if self.silent:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error


async def nodes() -> set[str]:
    return {"one", "two", "three"}  # on which nothing runs


class Bench:
    def __init__(self, **router: object) -> None:
        self.called: list[ReplicaId] = []
        self.health = FakeHealth()
        config = {
            "models": [{"name": model, "engine": "simulator"} for model in REPLICAS],
            "health": {"probe_period_s": 0.004},  # so that news comes every 2 ms
            "router": {"slow_start_s": 0, "seed": 0} | router,
        }
        handles: dict[str, Any] = {model: FakeEngines(model, self.called) for model in REPLICAS}
        self.service = ClusterService(parse_args(config), handles, self.health, "router-1", nodes)  # type: ignore[arg-type]

    def dispatcher(self, model: str) -> Dispatcher:
        return self.service._dispatchers[model]

    async def counters(self) -> tuple[dict[str, ModelCounters], dict[ReplicaId, ReplicaCounters]]:
        """What the Router says of models and replicas now."""
        await self.service.metrics()
        shown = self.health.shown
        return {m.model: m for m in shown.models}, {r.replica_id: r for r in shown.replicas}

    async def hears(self, news: News) -> None:
        self.health.news = news
        await self.reports(2)  # what the first one brings has been taken when the second one leaves

    async def reports(self, times: int) -> None:
        since = self.health.num_reports
        await until(lambda: self.health.num_reports >= since + times)

    async def ask(self, times: int = 1, prompt: TextPrompt | str = "hi") -> list[ReplicaId]:
        """Where so many requests have gone, one after another."""
        since = len(self.called)
        for _ in range(times):
            async with await self.service.open(text_request(prompt, max_tokens=1)) as stream:
                await collect(stream)
        return self.called[since:]

    async def close(self) -> None:
        while not self.service._reporting.done():  # before Python 3.12, wait_for may swallow a cancellation
            self.service._reporting.cancel()
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def _own_live_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_state, "live_sets", pinned_state.LiveSets())


@pytest.fixture
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    """Parametrized indirectly by fields of `router`."""
    made = Bench(**getattr(request, "param", {}))
    yield made
    await made.close()


def with_strategy(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("bench", [{"strategy": name}], indirect=True, ids=[name])


# --- Changes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "refusal", "param"),
    [
        (SetStrategy("m", "fastest"), InvalidRequest, "strategy"),
        (SetStrategy("nope", "adaptive"), ModelNotFound, "model"),
        (SetWeight("nobody", 1.0), NotFound, "id"),
        (SetDraining("nobody", True), NotFound, "id"),
        (SetDraining("nobody", False), NotFound, "id"),
        (SetNodeDraining("nowhere", True), NotFound, "node"),
        (SetNodeDraining("nowhere", False), NotFound, "node"),
        (ActOnBreaker("nobody", "open"), NotFound, "id"),
    ],
)
async def test_a_change_of_something_unknown_is_refused_before_the_health_actor_is_asked(
    bench: Bench, change: Change, refusal: type[BlazeError], param: str
) -> None:
    before = await bench.counters()
    with pytest.raises(refusal) as refused:
        await bench.service.change(change)
    assert refused.value.param == param
    assert bench.health.changes == []
    assert await bench.counters() == before


async def test_a_change_is_applied_here_at_once(bench: Bench) -> None:
    bench.health.news = NOTHING_NEW  # the next reports bring none of it
    for change in (
        SetStrategy("m", "adaptive"),
        SetWeight("a", 0.25),
        SetDraining("b", True),
        ActOnBreaker("x", "open"),
    ):
        await bench.service.change(change)
    models, replicas = await bench.counters()
    assert {name: model.strategy for name, model in models.items()} == {
        "m": "adaptive",
        "n": "least_connections",
    }
    assert [replicas[id].weight for id in "abcxy"] == [0.25, 1.0, 1.0, 1.0, 1.0]
    assert [id for id in "abcxy" if replicas[id].draining] == ["b"]
    assert {id: replicas[id].breaker for id in "xy"} == {"x": "open", "y": "closed"}
    assert bench.health.shown.control.version == 4
    assert "b" not in await bench.ask(12)


@pytest.mark.parametrize("back", [{"silent": True}, {"error": ConnectionError("the actor died")}])
async def test_without_the_health_actor_changes_are_refused_and_requests_are_not(
    bench: Bench, back: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.service._PATIENCE_S", 0.01)
    for name, value in back.items():
        setattr(bench.health, name, value)
    with pytest.raises(Overloaded) as refused:
        await bench.service.change(SetWeight("a", 0.0))
    assert refused.value.retry_after_s == 2
    assert bench.health.changes == [SetWeight("a", 0.0)]
    _, replicas = await bench.counters()  # its own, for nobody else's can be had
    assert replicas["a"].weight == 1.0
    assert set(await bench.ask(12)) == {"a", "b", "c"}


async def test_whoever_asks_for_a_change_and_leaves_is_no_failure_of_the_health_actor(bench: Bench) -> None:
    bench.health.silent = True
    asking = asyncio.create_task(bench.service.change(SetWeight("a", 0.0)))
    await until(lambda: bench.health.changes)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


# --- Drains ------------------------------------------------------------------------------------------


async def test_a_node_is_drained_with_all_that_is_on_it(bench: Bench) -> None:
    await bench.service.change(SetNodeDraining("two", True))
    await bench.service.change(SetNodeDraining("three", True))
    _, replicas = await bench.counters()
    assert [id for id in "abcxy" if replicas[id].draining] == ["b", "c"]
    assert set(await bench.ask(6)) == {"a"}
    pinned_state.live_sets.publish("app#m", tuple(ReplicaInfo(id, node="three") for id in "de"))
    await until(lambda: "d" in bench.dispatcher("m").table.columns.place)
    assert bench.dispatcher("m").available_replicas == 0
    await bench.service.change(SetNodeDraining("three", False))
    assert set(await bench.ask(6)) == {"d", "e"}


async def test_a_node_that_is_gone_can_be_taken_back(bench: Bench) -> None:
    await bench.hears(News(Control(1, draining_nodes=(("gone", Drain(1)),)), (), ()))
    await bench.service.change(SetNodeDraining("gone", False))
    assert bench.health.shown.control.draining_nodes == ()
    with pytest.raises(NotFound):
        await bench.service.change(SetNodeDraining("gone", True))


async def test_in_maintenance_nothing_new_is_begun_and_it_is_not_ready(bench: Bench) -> None:
    await bench.service.change(SetAllDraining(True))
    assert (bench.service.readiness().ready, bench.service.readiness().draining) == (False, True)
    with pytest.raises(Draining) as refused:
        await bench.ask()
    assert (refused.value.http_status, refused.value.type) == (503, "overloaded_error")
    assert refused.value.retry_after_s
    assert (await bench.service.status())["draining"] is True
    await bench.service.change(SetAllDraining(False))
    assert bench.service.readiness().ready
    assert (await bench.service.status())["draining"] is False
    assert len(await bench.ask(3)) == 3


@pytest.mark.parametrize("bench", [{"replicas": 2}], indirect=True)
async def test_in_maintenance_is_the_cluster_when_every_router_has_said_so(bench: Bench) -> None:
    await bench.service.change(SetAllDraining(True))
    seen = [(await bench.service.status())["draining"]]  # the health actor has just come back
    drained = bench.health.shown.control
    for other in (NO_CHANGES, drained):
        bench.health.others = (RouterReport("router-2", (), (), other),)
        seen.append((await bench.service.status())["draining"])
    bench.health.silent = True
    seen.append((await bench.service.status())["draining"])
    assert seen == [False, False, True, False]


# --- Following ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 4, 5])
async def test_an_older_or_equal_version_changes_nothing(bench: Bench, version: int) -> None:
    known = Control(5, strategies=(("m", "ip_hash"),), weights=(("a", 3.0),), draining=(("b", Drain(5)),))
    await bench.hears(News(known, (), ()))
    before = await bench.counters()
    assert (before[0]["m"].strategy, before[1]["a"].weight, before[1]["b"].draining) == ("ip_hash", 3.0, True)
    stale = Control(
        version,
        strategies=(("m", "round_robin"), ("n", "adaptive")),
        weights=(("a", 7.0),),
        draining=(("c", Drain(version)),),
        forced_open=("c",),
        breakers=((version, ActOnBreaker("c", "open")),),
    )
    await bench.hears(News(stale, (), ()))
    assert await bench.counters() == before
    assert bench.health.shown.control == known


async def test_breaker_actions_that_were_not_seen_are_applied_once_and_in_order(bench: Bench) -> None:
    def done(models: dict[str, ModelCounters]) -> list[tuple[ReplicaId, str]]:
        return [(event.replica_id, event.after) for event in models["m"].events]

    control = NO_CHANGES
    for change in (ActOnBreaker("a", "open"), ActOnBreaker("a", "close"), ActOnBreaker("b", "open")):
        control = control.after(change)
    await bench.hears(News(control, (), ()))
    models, replicas = await bench.counters()
    assert done(models) == [("a", "open"), ("a", "closed"), ("b", "open")]
    assert [replicas[id].breaker for id in "abc"] == ["closed", "open", "closed"]

    bench.dispatcher("m").table.breakers.act("b", "close")  # whatever may close it meanwhile
    later = control.after(SetWeight("c", 2.0)).after(ActOnBreaker("nobody", "open"))
    await bench.hears(News(later.after(ActOnBreaker("c", "open")), (), ()))
    models, replicas = await bench.counters()
    assert done(models)[3:] == [("b", "closed"), ("c", "open")]
    assert [replicas[id].breaker for id in "abc"] == ["closed", "closed", "open"]
    assert replicas["c"].weight == 2.0


@with_strategy("round_robin")
async def test_a_strategy_whose_name_stays_keeps_its_state(bench: Bench) -> None:
    strategy = bench.dispatcher("m").strategy
    (last,) = await bench.ask()
    named = NO_CHANGES.after(SetStrategy("m", "round_robin"))
    await bench.hears(News(named, (), ()))
    await bench.service.change(SetStrategy("m", "round_robin"))
    await bench.service.change(SetWeight("a", 2.0))
    assert bench.dispatcher("m").strategy is strategy
    order = REPLICAS["m"] * 2
    place = order.index(last) + 1
    assert await bench.ask(3) == list(order[place : place + 3])  # whose turn it would have been anyway

    await bench.service.change(SetStrategy("m", "weighted_round_robin"))
    assert bench.dispatcher("m").strategy is not strategy
    assert sorted(await bench.ask(4)) == ["a", "a", "b", "c"]


# --- News --------------------------------------------------------------------------------------------


@with_strategy("least_connections")
async def test_news_tells_what_the_others_have_in_flight(bench: Bench) -> None:
    peers = (("a", PeerLoad(5, 50.0)), ("nobody", PeerLoad(1, 1.0)), ("c", PeerLoad(1, 9.0)))
    await bench.hears(News(NO_CHANGES, peers, ()))
    assert set(await bench.ask(12)) == {"b"}
    await bench.hears(NOTHING_NEW)
    assert set(await bench.ask(24)) == {"a", "b", "c"}


@with_strategy("least_connections")
async def test_loads_of_others_are_forgotten_while_reports_are_not_delivered(bench: Bench) -> None:
    await bench.hears(News(NO_CHANGES, (("a", PeerLoad(5, 50.0)), ("b", PeerLoad(5, 50.0))), ()))
    assert set(await bench.ask(12)) == {"c"}
    bench.health.error = ConnectionError("the actor died")
    await bench.reports(2)
    assert set(await bench.ask(24)) == {"a", "b", "c"}
    bench.health.error = None
    await bench.reports(2)  # and goes on reporting
    assert set(await bench.ask(12)) == {"c"}


@with_strategy("round_robin")
async def test_news_tells_who_is_suspect(bench: Bench) -> None:
    await bench.hears(News(NO_CHANGES, (), ("a", "nobody", "c")))
    assert await bench.ask(4) == ["b"] * 4
    await bench.hears(NOTHING_NEW)
    assert set(await bench.ask(3)) == {"a", "b", "c"}


@with_strategy("adaptive")
async def test_news_tells_which_prefixes_replicas_hold(bench: Bench) -> None:
    prompt = TextPrompt("Once upon a time. " * 200)
    digest = packed(prompt_chain(prompt))
    await bench.hears(News(NO_CHANGES, (), (), prefixes=(("nobody", digest), ("b", digest), ("x", b""))))
    assert await bench.ask(6, prompt) == ["b"] * 6
    holders = bench.dispatcher("m").prefixes._holders
    assert {id for ids in holders.values() for id in ids} == {"b"}  # and of nobody else's there is no trace
    assert bench.dispatcher("n").prefixes._holders == {}


# --- Models that cannot be started -------------------------------------------------------------------


FAILING = ModelCondition("n", "failing", "replicas could not be started (OSError)", "OSError: /srv/secret")


def lose_all(model: str) -> None:
    pinned_state.live_sets.publish(f"app#{model}", ())


async def test_requests_for_a_model_that_cannot_be_started_are_refused_at_once_and_say_why(
    bench: Bench,
) -> None:
    lose_all("n")
    await bench.hears(News(NO_CHANGES, (), (), conditions=(FAILING,)))
    with pytest.raises(ModelUnavailable) as refused:
        await bench.service.open(replace(text_request(), model="n"))
    assert refused.value.http_status == 503
    assert "replicas could not be started (OSError)" in refused.value.message
    assert "secret" not in refused.value.message
    assert refused.value.retry_after_s is not None
    readiness = bench.service.readiness()
    assert (readiness.missing, readiness.reasons) == (("n",), (("n", FAILING.reason),))
    assert await bench.ask(3)  # the other model serves


async def test_a_refused_request_wakes_its_model_all_the_same_and_for_all_of_them_once(bench: Bench) -> None:
    """It may have been scaled to zero, and what kept it from loading may have gone."""
    lose_all("n")
    await bench.hears(News(NO_CHANGES, (), (), conditions=(FAILING,)))
    for _ in range(3):
        with pytest.raises(ModelUnavailable):
            await bench.service.open(replace(text_request(), model="n"))
    await until(lambda: pinned_state.ANY in bench.called)
    assert bench.called == [pinned_state.ANY]


async def test_those_that_wait_for_it_are_not_left_waiting(bench: Bench) -> None:
    lose_all("n")
    waiting = asyncio.create_task(bench.service.open(replace(text_request(), model="n")))
    await until(lambda: bench.dispatcher("n").counters()[0].waiting == 1)
    await bench.hears(News(NO_CHANGES, (), (), conditions=(FAILING,)))
    with pytest.raises(ModelUnavailable):
        await waiting


async def test_a_model_that_loads_is_waited_for_and_ready_says_so(bench: Bench) -> None:
    lose_all("n")
    await bench.hears(News(NO_CHANGES, (), (), conditions=(ModelCondition("n", "loading"),)))
    assert bench.service.readiness().reasons == (("n", "loading"),)
    waiting = asyncio.create_task(bench.service.open(replace(text_request(), model="n")))
    await until(lambda: bench.dispatcher("n").counters()[0].waiting == 1)
    pinned_state.live_sets.publish("app#n", (ReplicaInfo("x"),))
    async with await waiting as stream:
        assert await collect(stream)


async def test_a_replica_that_is_there_serves_whatever_is_said_of_its_model(bench: Bench) -> None:
    await bench.hears(News(NO_CHANGES, (), (), conditions=(FAILING,)))
    async with await bench.service.open(replace(text_request(), model="n")) as stream:
        assert await collect(stream)
    assert bench.service.readiness().ready


DEAD = replace(FAILING, reason="replicas failed again and again, and are not restarted any more")


async def test_a_model_whose_replicas_are_all_given_up_is_refused_and_ready_says_so(bench: Bench) -> None:
    waiting = asyncio.create_task(bench.service.open(replace(text_request(), model="n")))
    await bench.hears(News(NO_CHANGES, (), ("x", "y"), conditions=(DEAD,), condemned=("x", "y")))
    with pytest.raises(ModelUnavailable) as refused:
        await bench.service.open(replace(text_request(), model="n"))
    assert (refused.value.http_status, DEAD.reason in refused.value.message) == (503, True)
    assert bench.service.readiness().missing == ("n",)
    assert await bench.ask(3)  # the other model serves
    await (await waiting).aclose()


async def test_what_waits_for_a_replica_that_is_given_up_is_told(bench: Bench) -> None:
    await bench.hears(News(NO_CHANGES, (), ("x", "y"), condemned=("x", "y")))  # they will be restarted
    waiting = asyncio.create_task(bench.service.open(replace(text_request(), model="n")))
    await until(lambda: bench.dispatcher("n").counters()[0].waiting == 1)
    await bench.hears(News(NO_CHANGES, (), ("x", "y"), conditions=(DEAD,), condemned=("x", "y")))
    with pytest.raises(ModelUnavailable):
        await waiting


async def test_a_health_actor_that_hears_nobody_keeps_nobody_from_serving(bench: Bench) -> None:
    await bench.hears(News(NO_CHANGES, (), ("a", "b", "c", "x", "y"), conditions=(DEAD,)))
    assert bench.service.readiness().ready
    assert set(await bench.ask(12)) == {"a", "b", "c"}
    async with await bench.service.open(replace(text_request(), model="n")) as stream:
        assert await collect(stream)
