"""What `blaze drain` drains, and when that is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from blaze.checks import check_timeout
from blaze.errors import EnvironmentProblem
from blaze.remote import MANAGEMENT, get_json

_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Target:
    """``path``: of the management API. ``left``: from the cluster's status to how much is in flight; None
    while a Router may still send requests there."""

    name: str
    path: str
    left: Callable[[dict[str, Any]], int | None]


def target(base: str, replica: str | None, node: str | None, *, everything: bool) -> Target:
    """Raises :class:`EnvironmentProblem` unless it is exactly one, and one that its letters tell apart."""
    if (replica is not None) + (node is not None) + everything != 1:
        raise EnvironmentProblem("name a replica, or --node NODE, or --all")
    if everything:
        return Target("the cluster", "/drain", _left_of_all)
    if node is not None:
        whole = _node(base, node)
        return Target(
            f"node {whole}",
            f"/nodes/{quote(whole, safe='')}/drain",
            lambda status: _left_of_replicas(status, "node", whole),
        )
    assert replica is not None
    return Target(
        replica,
        f"/replicas/{quote(replica, safe='')}/drain",
        lambda status: _left_of_replicas(status, "id", replica),
    )


def drain_body(*, undo: bool, timeout_s: float | None) -> dict[str, Any]:
    """Raises :class:`InvalidRequest` when that is no number of seconds."""
    check_timeout(timeout_s)
    return {"draining": not undo, "timeout_s": timeout_s}


def _node(base: str, first_letters: str) -> str:
    """A node that has replicas may be named by as many letters as tell it from the others."""
    nodes = {row["node"] for row in get_json(f"{base}{MANAGEMENT}/replicas")["replicas"]}
    found = [node for node in nodes if node.startswith(first_letters)]
    if len(found) > 1:
        raise EnvironmentProblem(f"{first_letters} is the beginning of {len(found)} nodes")
    return found[0] if found else first_letters


def _left_of_all(status: dict[str, Any]) -> int | None:
    return sum(int(model["open"]) for model in status["models"]) if status["draining"] else None


def _left_of_replicas(status: dict[str, Any], key: str, value: str) -> int | None:
    if not status["complete"]:  # the health actor is away, or a Router
        return None
    rows = [row for row in status["replicas"] if row[key] == value]
    unheard = [row for row in status["unheard"] if row[key] == value]
    if any(row["state"] == "ready" for row in rows) or not all(row["draining"] for row in unheard):
        return None
    return sum(int(row["in_flight"]) for row in (*rows, *unheard))


def wait_until_idle(base: str, drained: Target, show: Callable[[str], None]) -> None:
    """Until nothing is in flight there. ``show`` is told how much still is."""
    while True:
        left = drained.left(get_json(f"{base}{MANAGEMENT}/status"))
        if left == 0:
            return
        show(f"{drained.name}: {'begins to drain' if left is None else f'{left} in flight'}")
        time.sleep(_POLL_S)
