"""After the faults: everything has to become as it was."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from tests.chaos.effects import Effects
from tests.chaos.load import ask_and_check
from tests.chaos.models import Model
from tests.chaos.score import Record

_AT_ONCE = 4  # requests per model: a breaker closes by requests only


@dataclass(frozen=True)
class Settled:
    unwell: tuple[str, ...]  # what still was at the end of the time
    records: tuple[Record, ...]  # of what was asked meanwhile


async def settle(
    effects: Effects,
    models: Sequence[Model],
    client: httpx.AsyncClient,
    url: str,
    *,
    within_s: float,
    every_s: float = 0.75,
) -> Settled:
    rng, give_up = random.Random(0), time.monotonic() + within_s
    wanted = {model.name: model.replicas for model in models}
    records: list[Record] = []
    while True:
        try:
            status = await asyncio.to_thread(effects.status)
            unwell = what_is_unwell(status, wanted)
            if not await asyncio.to_thread(effects.is_deployed):
                unwell = (*unwell, "the application is not RUNNING")
        except (httpx.HTTPError, OSError, RuntimeError) as error:
            unwell = (f"status: {type(error).__name__}: {error}",)
        if not unwell or time.monotonic() > give_up:
            return Settled(unwell, tuple(records))
        askers = [model for model in models for _ in range(_AT_ONCE)]
        asked = [replace(model.draw(rng), leave_after_s=None) for model in askers]
        records += await asyncio.gather(
            *(ask_and_check(client, url, *one) for one in zip(askers, asked, strict=True))
        )
        await asyncio.sleep(every_s)  # every Router has reported since


def what_is_unwell(status: Mapping[str, Any], wanted: Mapping[str, int]) -> tuple[str, ...]:
    """Of an application that nobody asks anything of. ``wanted``: replicas per model."""
    ready = Counter(r["model"] for r in status["replicas"] if r["state"] == "ready")
    found = [
        f"{name}: {ready[name]} of {count} replicas ready"
        for name, count in wanted.items()
        if ready[name] != count
    ]
    for replica in status["replicas"]:
        if replica["state"] != "ready":
            found.append(f"{replica['id']} is {replica['state']}")
        if replica["breaker"] != "closed":
            found.append(f"{replica['id']}: breaker {replica['breaker']}")
        for counter in ("in_flight", "running", "queued"):
            if replica[counter]:
                found.append(f"{replica['id']}: leaked, {counter} {replica[counter]}")
    for model in status["models"]:
        for counter in ("waiting", "open"):  # a graceful stop waits for open ones
            if model[counter]:
                found.append(f"{model['name']}: leaked, {model[counter]} {counter}")
    return tuple(found)
