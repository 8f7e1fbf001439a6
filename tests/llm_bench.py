"""An LLM engine on a model that says what its script says."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from blaze.engine_config import LLMConfig
from blaze.engines.llm import engine as engine_module
from blaze.engines.llm.engine import LLMEngine
from blaze.errors import ErrorInfo
from blaze.models.sources import HubSource
from blaze.types import (
    Event,
    Failed,
    Request,
    TextPrompt,
)
from tests.fake_models import BROKEN, ScriptedRunner, fake_served
from tests.fakes import FakeClock
from tests.samples import collect, terminals, text_request
from tests.waiting import until_status

SCRIPTS = {
    "a": "abcX tail",
    "b": "bbbbbbbbbb",
    "c": "endings",
    "d": "d" * 60,
    "e": "AB",
    "f": "C",
    "g": "ok" + chr(BROKEN),
}

VARIANT = "org/model@None/torch.float32/none/scripted"


class Gate:
    """Holds the compute thread before a step until the test opens it."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()

    def __call__(self) -> None:
        assert self.open.wait(30), "the test never opened the gate"


class EngineBench:
    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, max_batch_size: int = 8, kv_tokens: int = 4096
    ) -> None:
        self.gate = Gate()
        self.clock = FakeClock()
        self.runner = ScriptedRunner(SCRIPTS, before_step=self.gate)
        self.served = fake_served(self.runner, kv_tokens=kv_tokens)
        monkeypatch.setattr(engine_module, "load", lambda *_args: self.served)
        self.engine = LLMEngine(
            HubSource("org/model"),
            LLMConfig(max_batch_size=max_batch_size),
            threads=1,
            cache=Path("/nonexistent"),
            clock=self.clock,
        )

    async def together(self, *requests: Request) -> list[list[Event]]:
        """All requests in one batch: they pile up behind one that is held."""
        self.gate.open.clear()
        first = asyncio.create_task(collect(self.engine.run(text_request(TextPrompt("f")))))
        await until_status(self.engine, running=1)
        tasks = []
        for request in requests:  # one after another, so that the rows have this order
            tasks.append(asyncio.create_task(self.ask(request)))
            await until_status(self.engine, queued=len(tasks))
        self.gate.open.set()
        await first
        return list(await asyncio.gather(*tasks))

    async def ask(self, request: Request) -> list[Event]:
        return await collect(self.engine.run(request))


def failure(events: list[Event]) -> ErrorInfo:
    """Of an answer that ends with one."""
    assert terminals(events) == [events[-1]]
    assert isinstance(events[-1], Failed)
    return events[-1].error
