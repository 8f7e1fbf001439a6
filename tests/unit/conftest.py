"""Fixtures of more than one file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.llm_bench import EngineBench


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineBench]:
    from tests.llm_bench import EngineBench  # torch is heavy, and most unit tests do without

    made = EngineBench(monkeypatch)
    await made.engine.start()
    yield made
    made.gate.open.set()
    await made.engine.stop()
