"""What Serve says of a deployment, in Blaze's words."""

from __future__ import annotations

import pytest
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview

from blaze.health.conditions import DeploymentFacts, condition_of
from deployments.health import facts_of

STATES = {"STARTING": 1, "RUNNING": 2, "STOPPING": 1}


def overview(status: str, trigger: str, states: dict[str, int]) -> DeploymentStatusOverview:
    return DeploymentStatusOverview(DeploymentStatus(status), trigger, states, "why")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "trigger", "found"),
    [
        ("HEALTHY", "CONFIG_UPDATE_COMPLETED", "HEALTHY"),
        ("UNHEALTHY", "HEALTH_CHECK_FAILED", "UNHEALTHY"),
        ("DEPLOY_FAILED", "REPLICA_STARTUP_FAILED", "DEPLOY_FAILED"),
        ("UNHEALTHY", "REPLICA_STARTUP_FAILED", "DEPLOY_FAILED"),
    ],
)
def test_the_status_and_how_many_replicas_there_are(status: str, trigger: str, found: str) -> None:
    assert facts_of(overview(status, trigger, STATES)) == DeploymentFacts(found, "why", 4, stopping=1)


def test_a_model_that_was_woken_and_cannot_be_started_fails() -> None:
    assert (
        condition_of("m", (), facts_of(overview("UNHEALTHY", "REPLICA_STARTUP_FAILED", {}))).state
        == "failing"
    )
