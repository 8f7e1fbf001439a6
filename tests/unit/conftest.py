"""Unit tests wait for nothing: what the router does after a while, it does at once here."""

from __future__ import annotations

import pytest

from blaze.routing import dispatcher


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_DEADLINE_GRACE_S", 0.0)
    monkeypatch.setattr(dispatcher, "_RECHECK_S", 0.0)
