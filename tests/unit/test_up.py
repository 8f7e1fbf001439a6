"""`blaze up` that is told to stop: whether anybody may be waiting for an answer."""

from __future__ import annotations

import pytest

from blaze.config import APP_NAME
from blaze.errors import EnvironmentProblem
from deployments.local import ApplicationProgress, DeploymentProgress
from deployments.up import may_be_serving


class FakeCluster:
    """``running``: replicas by deployment; None: it does not answer."""

    def __init__(self, running: dict[str, int] | None) -> None:
        self._running = running

    def progress(self, app_name: str = APP_NAME) -> ApplicationProgress:
        assert app_name == "mine"
        if self._running is None:
            raise EnvironmentProblem("Ray's dashboard does not answer")
        deployments = (DeploymentProgress(name, running, 2, "") for name, running in self._running.items())
        return ApplicationProgress("DEPLOYING", "", tuple(deployments))


@pytest.mark.parametrize(
    ("running", "serving"),
    [
        ({}, False),
        ({"Router": 0, "llm-m": 1}, False),
        ({"Router": 1, "llm-m": 1, "llm-n": 0}, True),
        ({"Router": 2, "llm-m": 1, "llm-n": 1}, True),
        (None, True),
    ],
    ids=["nothing is there", "no Router", "a model still loads", "all is there", "not known"],
)
def test_a_cluster_in_which_a_router_runs_may_be_serving(
    running: dict[str, int] | None, serving: bool
) -> None:
    assert may_be_serving(FakeCluster(running), "mine") is serving
