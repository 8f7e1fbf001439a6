"""What operators change over HTTP."""

from __future__ import annotations

import json

import pytest

from blaze.control import (
    ActOnBreaker,
    Change,
    SetAllDraining,
    SetDraining,
    SetNodeDraining,
    SetStrategy,
    SetWeight,
)
from tests.api_bench import ApiBench

BASE = "/api/v1/blaze"

CHANGES: list[tuple[str, str, Change]] = [
    ("strategy", '{"model": "m", "strategy": "adaptive"}', SetStrategy("m", "adaptive")),
    ("replicas/a/weight", '{"weight": 2.5}', SetWeight("a", 2.5)),
    ("replicas/a/weight", '{"weight": 0}', SetWeight("a", 0.0)),
    ("replicas/a/drain", "", SetDraining("a", True)),
    ("replicas/a/drain", '{"draining": false}', SetDraining("a", False)),
    ("replicas/a/drain", '{"timeout_s": 2.5}', SetDraining("a", True, 2.5)),
    ("replicas/a/drain", '{"timeout_s": null}', SetDraining("a", True)),
    ("nodes/n-1/drain", "", SetNodeDraining("n-1", True)),
    ("nodes/n-1/drain", '{"draining": true, "timeout_s": 0}', SetNodeDraining("n-1", True, 0.0)),
    ("nodes/n-1/drain", '{"draining": false}', SetNodeDraining("n-1", False)),
    ("drain", "", SetAllDraining(True)),
    ("drain", '{"timeout_s": 60}', SetAllDraining(True, 60.0)),
    ("drain", '{"draining": false}', SetAllDraining(False)),
    ("replicas/a/breaker", '{"action": "open"}', ActOnBreaker("a", "open")),
    ("replicas/a/breaker", '{"action": "close"}', ActOnBreaker("a", "close")),
    ("replicas/a/breaker", '{"action": "reset"}', ActOnBreaker("a", "reset")),
]


@pytest.mark.parametrize(("path", "body", "change"), CHANGES)
async def test_a_change_is_passed_on(path: str, body: str, change: Change) -> None:
    async with ApiBench() as bench:
        response = await bench.http.post(f"{BASE}/{path}", content=body)
        assert response.status_code == 200
        assert bench.service.changes == [change]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("strategy", {"model": "m"}, "strategy"),
        ("strategy", {"model": "m", "strategy": 3}, "strategy"),
        ("strategy", {"model": "m", "strategy": "adaptive", "when": "now"}, "when"),
        ("replicas/a/weight", {}, "weight"),
        ("replicas/a/weight", {"weight": -1}, "weight"),
        ("replicas/a/weight", {"weight": float("nan")}, "weight"),
        ("replicas/a/weight", {"weight": float("inf")}, "weight"),
        ("replicas/a/weight", {"weight": "1"}, "weight"),
        ("replicas/a/weight", {"weight": True}, "weight"),
        ("replicas/a/breaker", {"action": "explode"}, "action"),
        ("replicas/a/drain", {"draining": "yes"}, "draining"),
        ("replicas/a/drain", {"timeout_s": float("nan")}, "timeout_s"),
        ("replicas/a/drain", {"timeout_s": float("inf")}, "timeout_s"),
        ("replicas/a/drain", {"timeout_s": -1}, "timeout_s"),
        ("replicas/a/drain", {"timeout_s": 1e9}, "timeout_s"),
        ("replicas/a/drain", {"timeout_s": "5"}, "timeout_s"),
        ("replicas/a/drain", {"timeout": 5}, "timeout"),
        ("nodes/n/drain", {"timeout_s": -0.5}, "timeout_s"),
        ("nodes/n/drain", {"draining": 1}, "draining"),
        ("drain", {"timeout_s": float("nan")}, "timeout_s"),
        ("drain", {"model": "m"}, "model"),
    ],
)
async def test_what_is_wrong_is_named_and_changes_nothing(
    path: str, body: dict[str, object], param: str
) -> None:
    async with ApiBench() as bench:
        response = await bench.http.post(f"{BASE}/{path}", content=json.dumps(body))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert bench.service.changes == []


async def test_replicas_are_those_of_the_status() -> None:
    async with ApiBench() as bench:
        replicas = (await bench.http.get(f"{BASE}/replicas")).json()
        assert replicas == {"replicas": (await bench.http.get(f"{BASE}/status")).json()["replicas"]}


async def test_changes_are_made_by_post_alone() -> None:
    async with ApiBench() as bench:
        response = await bench.http.get(f"{BASE}/strategy")
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
