"""Whether a model can be served, and what clients and operators are told when not."""

from __future__ import annotations

import pytest

from blaze.health.conditions import DeploymentFacts, condition_of
from blaze.reports import ModelCondition, ReplicaState

READY, STARTING, DEAD = ReplicaState.READY, ReplicaState.STARTING, ReplicaState.DEAD
TRACEBACK = """The deployment failed to start 3 times in a row. See controller logs for details.
Error:
ray::ServeReplica:blaze:llm-m.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "/srv/secret/loading.py", line 12, in load
blaze.errors.ModelSourceError: source: /srv/secret/model: there is no such folder"""
NOT_STARTED = "replicas could not be started (ModelSourceError)"


def test_one_ready_replica_makes_a_model_ready() -> None:
    facts = DeploymentFacts("HEALTHY", "", 2)
    assert condition_of("m", [DEAD, READY], facts) == ModelCondition("m", "ready")


def test_a_model_whose_replicas_cannot_be_started_fails_and_clients_hear_no_paths() -> None:
    found = condition_of("m", [], DeploymentFacts("DEPLOY_FAILED", TRACEBACK, 0))
    assert found == ModelCondition(
        "m", "failing", NOT_STARTED, f"{NOT_STARTED}: source: /srv/secret/model: there is no such folder"
    )


def test_the_detail_is_one_line_of_bounded_length() -> None:
    found = condition_of("m", [], DeploymentFacts("DEPLOY_FAILED", "ValueError: " + "x  y" * 1000, 0))
    assert (len(found.detail), "\n" in found.detail) == (300, False)


def test_a_failure_without_a_known_cause_is_told_as_such() -> None:
    found = condition_of(
        "m", [], DeploymentFacts("DEPLOY_FAILED", "Something else.\nNo traceback here: /x", 0)
    )
    assert found == ModelCondition(
        "m", "failing", "replicas could not be started", "replicas could not be started"
    )


def test_while_it_is_tried_again_it_still_loads_and_says_what_went_wrong() -> None:
    message = "A replica failed to start with exception. Retrying 2 more time(s). Error:\nOSError: disk"
    found = condition_of("m", [STARTING], DeploymentFacts("UPDATING", message, 1))
    assert (found.state, found.reason) == ("loading", "a replica could not be started (OSError)")


def test_an_update_that_cannot_start_leaves_the_model_ready_and_says_so() -> None:
    found = condition_of("m", [READY], DeploymentFacts("DEPLOY_FAILED", TRACEBACK, 1))
    assert (found.state, found.reason) == ("ready", NOT_STARTED)


@pytest.mark.parametrize(
    ("states", "state"), [([DEAD], "failing"), ([DEAD, STARTING], "loading"), ([DEAD, READY], "ready")]
)
def test_replicas_that_are_given_up_fail_the_model_when_there_is_no_other(
    states: list[ReplicaState], state: str
) -> None:
    found = condition_of("m", states, DeploymentFacts("HEALTHY", "", 1), given_up=("given up after 6: why",))
    assert (found.state, found.detail) == (state, "given up after 6: why")


def test_a_model_without_replicas_is_idle_only_when_none_are_wanted() -> None:
    assert condition_of("m", [], DeploymentFacts("HEALTHY", "", 0)).state == "idle"
    assert condition_of("m", [], DeploymentFacts("UPDATING", "", 1)).state == "loading"
    assert condition_of("m", [], None).state == "loading"
