"""Settings for all tests: no network, no usage reports."""

from __future__ import annotations

import os

import pytest

from blaze.engines.openmp import share_cores

share_cores()  # before anything loads torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that drive Ray from this process come last.

    Their handles leave gRPC threads behind, and Ray forks when it starts: a cluster that is started after
    them can hang in a child that inherited a lock.
    """
    items.sort(key=lambda item: item.get_closest_marker("ray_driver") is not None)
