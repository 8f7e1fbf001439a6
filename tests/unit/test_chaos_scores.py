"""The judge of chaos runs finds what is lost and what is wrong, and nothing else."""

from __future__ import annotations

import copy
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from blaze.engine_config import SimulatorConfig
from blaze.engines.faults import Faults
from blaze.engines.simulator import SimulatorEngine
from blaze.types import Events, ReplicaId, Request
from tests.api_bench import ApiBench
from tests.chaos.expected import Expected, simulated
from tests.chaos.peace import what_is_unwell
from tests.chaos.score import ROUTER_KILL_S, Record, score
from tests.chaos.workload import Asked, draw_request, what_is_wrong
from tests.fakes import FakePool
from tests.streams import Answer, ask

OPTIONS = SimulatorConfig(ttft_ms=0, inter_token_ms=0, tokens=12, jitter=0.3, seed=5)
EXPECTED = Expected({0: "go and "}, "stop", prompt_tokens=3, completion_tokens=2)


class EngineCall:
    def __init__(self, engine: SimulatorEngine, request: Request) -> None:
        self._answer = engine.run(request)

    def __aiter__(self) -> EngineCall:
        return self

    async def __anext__(self) -> Events:
        return await anext(self._answer)

    def cancel(self) -> None:
        """It ends by itself."""


class EnginePool(FakePool):
    def __init__(self, **engines: SimulatorEngine) -> None:
        super().__init__(tuple(engines))
        self._engines = engines

    def call(self, replica_id: ReplicaId, request: Request) -> Any:
        return EngineCall(self._engines[replica_id], request)


@pytest.fixture
async def bench() -> AsyncIterator[ApiBench]:
    """A healthy simulator and two that fail half of their requests, one way or the other."""
    engines = {name: SimulatorEngine(OPTIONS, rank=rank) for rank, name in enumerate("abc")}
    engines["b"].set_faults(Faults(break_rate=0.5))
    engines["c"].set_faults(Faults(fail_rate=0.5))
    async with ApiBench(EnginePool(**engines)) as api:
        yield api


async def test_what_is_worked_out_is_what_the_api_answers_whatever_replicas_do(bench: ApiBench) -> None:
    rng = random.Random(1)
    for _ in range(100):
        asked = draw_request(rng, "m", tokens=OPTIONS.tokens)
        answer = await ask(bench.http, asked.path, asked.body)
        assert answer.lost is None, answer
        assert what_is_wrong(answer, simulated(OPTIONS, asked.body)) is None


def test_requests_are_of_all_kinds_and_the_same_for_the_same_seed() -> None:
    drawn = [draw_request(random.Random(seed), "m", tokens=12) for seed in range(200)]
    assert drawn == [draw_request(random.Random(seed), "m", tokens=12) for seed in range(200)]
    assert {asked.path for asked in drawn} == {"/v1/chat/completions", "/v1/completions"}
    assert {asked.body.get("n", 1) for asked in drawn} == {1, 2}
    assert {asked.body.get("stream", False) for asked in drawn} == {True, False}
    assert {asked.body["max_tokens"] <= 12 for asked in drawn} == {True, False}
    assert any(asked.leave_after_s is not None for asked in drawn)


def whole() -> Answer:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return Answer(
        texts={0: "go and "}, finish_reasons={0: "stop"}, usage=usage, ids={"a"}, status=200, done=True
    )


def test_nothing_is_wrong_with_a_right_answer() -> None:
    assert whole().lost is None
    assert what_is_wrong(whole(), EXPECTED) is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"texts": {0: "go "}}, "text of choice 0"),
        ({"texts": {0: "go go and "}}, "text of choice 0"),
        ({"texts": {}}, "text of choice 0"),
        ({"finish_reasons": {0: "length"}}, "finish_reason"),
        ({"finish_reasons": {}}, "finish_reason"),
        ({"usage": None}, "usage"),
        ({"usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}}, "usage"),
        ({"ids": {"a", "b"}}, "2 ids"),
        ({"texts": {0: "go and ", 1: "go "}, "finish_reasons": {0: "stop", 1: "stop"}}, "choices [1]"),
        ({"finish_reasons": {0: "stop", 1: "stop"}}, "choices [1]"),
    ],
)
def test_what_is_wrong_is_found(change: dict[str, Any], what: str) -> None:
    found = what_is_wrong(replace(whole(), **change), EXPECTED)
    assert found is not None
    assert what in found


def test_of_an_answer_that_the_client_left_only_what_it_has_read_is_judged() -> None:
    left = replace(whole(), left=True, done=False, usage=None, finish_reasons={}, texts={0: "go "})
    assert left.lost is None
    assert what_is_wrong(left, EXPECTED) is None
    assert what_is_wrong(replace(left, texts={0: "and "}), EXPECTED) is not None
    assert what_is_wrong(replace(left, texts={0: "go ", 1: "go "}), EXPECTED) is not None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"status": 503}, "status 503"),
        ({"status": None, "trouble": "ReadError: cut"}, "ReadError: cut"),
        ({"done": False}, "no [DONE]"),
        ({"trouble": "error event: no"}, "error event: no"),
    ],
)
def test_what_is_lost_is_found(change: dict[str, Any], why: str) -> None:
    assert replace(whole(), **change).lost == why


def test_a_stream_is_read_to_its_last_line() -> None:
    answer = Answer(status=200)
    chunk = '{"id": "a", "choices": [{"index": 0, "delta": {"content": "go "}, "finish_reason": null}]}'
    for at, line in enumerate([": comment", f"data: {chunk}", "", f"data: {chunk}", f"data: {chunk}"]):
        answer.take_line(line, float(at * at))
    assert (answer.text, answer.longest_gap_s, answer.first_text_s) == ("go go go ", 8.0, 1.0)
    assert answer.lost == "no [DONE]"
    answer.end(40.0)
    assert (answer.longest_gap_s, answer.ended_at) == (24.0, 40.0)
    answer.take_line("data: [DONE]", 20.0)
    assert answer.lost is None
    answer.take_line(f"data: {chunk}", 20.0)
    assert answer.lost is not None
    assert "after [DONE]" in answer.lost


@pytest.mark.parametrize(
    "more", ['{"content": "and "}, "finish_reason": null', '{}, "finish_reason": "stop"']
)
def test_nothing_of_a_choice_comes_after_its_finish(more: str) -> None:
    answer = Answer(status=200)
    deltas = ('{"content": "go "}, "finish_reason": null', '{}, "finish_reason": "stop"')
    for delta in deltas:
        answer.take_line(f'data: {{"id": "a", "choices": [{{"index": 0, "delta": {delta}}}]}}', 1.0)
    answer.take_line('data: {"id": "a", "choices": [], "usage": {"total_tokens": 5}}', 1.0)
    assert answer.trouble is None
    answer.take_line(f'data: {{"id": "a", "choices": [{{"index": 0, "delta": {more}}}]}}', 1.0)
    answer.take_line("data: [DONE]", 1.0)
    assert answer.lost is not None
    assert "after the finish of choice 0" in answer.lost


def test_no_choice_comes_twice() -> None:
    answer, choice = Answer(status=200), {"index": 0, "text": "go ", "finish_reason": "stop"}
    answer.take_whole({"id": "a", "usage": {}, "choices": [choice]})
    assert answer.lost is None
    answer = Answer(status=200)
    answer.take_whole({"id": "a", "usage": {}, "choices": [choice, choice]})
    assert answer.lost == "choice 0 twice"


def test_an_answer_is_whole_when_each_choice_has_ended_under_one_id() -> None:
    assert whole().is_whole
    for change in (
        {"ids": {"a", "b"}},
        {"finish_reasons": {}},
        {"done": False},
        {"left": True},
        {"status": 503},
    ):
        assert not replace(whole(), **change).is_whole, change


def test_an_error_ends_a_stream_like_an_answer() -> None:
    answer = Answer(status=200)
    answer.take_line('data: {"error": {"message": "broken", "code": "draining"}}', 1.0)
    assert answer.lost == "error event: broken"
    assert not answer.is_ended_by_an_error
    answer.take_line("data: [DONE]", 1.0)
    assert answer.is_ended_by_an_error
    assert (answer.error_code, answer.is_whole) == ("draining", False)


def record(began: float, ended: float, *, wrong: str | None = None, **change: Any) -> Record:
    answer = replace(whole(), started_at=began, ended_at=ended, **change)
    return Record(Asked("/", {}), answer, wrong)


def test_scores() -> None:
    found = score(
        [
            record(10, 12, longest_gap_s=0.5),
            record(10, 12, wrong="usage", longest_gap_s=0.1, first_text_s=2.0),
            record(11, 13, trouble="ReadError: cut"),
            record(11, 13, left=True, done=False),
        ],
        began_at=10,
    )
    assert (found.sent, found.left, found.apart) == (4, 1, 0)
    assert (found.longest_gap_s, found.longest_wait_s) == (0.5, 2.0)
    assert [(lost.what, lost.began_s, lost.ended_s) for lost in found.lost] == [("ReadError: cut", 1, 3)]
    assert [wrong.what for wrong in found.wrong] == ["usage"]


CUT = {"status": 200, "trouble": "ReadError: cut", "broke": True, "done": False}


@pytest.mark.parametrize(
    ("began", "ended", "change", "apart"),
    [
        (10, 20.1, CUT, True),
        (10, 20.1, {"status": 502, "trouble": "status 502", "error_code": "router_lost"}, True),
        (10, 20.1, {"trouble": "error event: it was told", "error_code": "replica_lost"}, False),
        (10, 20.1, {"status": 503, "trouble": "status 503", "error_code": "model_unavailable"}, False),
        (10, 20.1, {"status": 500, "trouble": "status 500: b'internal'"}, False),
        (10, 20.1, {"trouble": "JSONDecodeError: garbled"}, False),
        (10, 20.1, {"done": False}, False),
        (20.1, 20.2, CUT, False),
        (10, 19.9, CUT, False),
        (10, 20 + ROUTER_KILL_S + 1, CUT, False),
    ],
)
def test_only_connections_that_broke_with_a_killed_router_are_scored_apart(
    began: float, ended: float, change: dict[str, Any], apart: bool
) -> None:
    found = score([record(began, ended, **change)], began_at=0, router_kills=[20])
    assert (found.apart, len(found.lost)) == ((1, 0) if apart else (0, 1))


REFUSAL = {"error": {"message": "no", "type": "server_error", "param": None, "code": "router_lost"}}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_knows_what_it_was_told_from_a_connection_that_broke(stream: bool) -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        return httpx.Response(502, json=REFUSAL)

    def refuse_strangely(_: httpx.Request) -> httpx.Response:
        return httpx.Response(500, text="Internal Server Error")

    def cut(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("cut", request=request)

    def garble(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text="data: {no json\n\n")

    found = []
    for handler in (refuse, refuse_strangely, cut, garble):
        async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as http:
            found.append(await ask(http, "http://blaze/", {"stream": stream}))
    assert [answer.lost is not None for answer in found] == [True] * 4
    assert [answer.error_code for answer in found] == ["router_lost", None, None, None]
    assert [answer.broke for answer in found] == [False, False, True, False]


WELL = {
    "replicas": [
        {
            "id": name,
            "model": "m",
            "state": "ready",
            "breaker": "closed",
            "in_flight": 0,
            "running": 0,
            "queued": 0,
        }
        for name in "ab"
    ],
    "models": [{"name": "m", "waiting": 0, "open": 0}],
}


def test_peace_is_when_all_are_ready_and_nobody_holds_anything() -> None:
    assert what_is_unwell(WELL, {"m": 2}) == ()
    assert what_is_unwell(WELL, {"m": 3}) == ("m: 2 of 3 replicas ready",)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"state": "draining"}, "draining"),
        ({"breaker": "half_open"}, "breaker half_open"),
        ({"in_flight": 1}, "leaked, in_flight 1"),
        ({"running": 2}, "leaked, running 2"),
        ({"queued": 1}, "leaked, queued 1"),
    ],
)
def test_what_keeps_peace_away_is_named(change: dict[str, Any], what: str) -> None:
    status = copy.deepcopy(WELL)
    status["replicas"][1] |= change  # type: ignore[operator]
    assert any(what in one for one in what_is_unwell(status, {"m": 2}))
    held = {**WELL, "models": [{"name": "m", "waiting": 3, "open": 7}]}
    assert what_is_unwell(held, {"m": 2}) == ("m: leaked, 3 waiting", "m: leaked, 7 open")
