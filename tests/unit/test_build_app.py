"""What Serve is told: how deployments are replaced, and which of them a change of the config replaces."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.serve._private.build_app import build_app as build
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.deploy_utils import get_deploy_args

from deployments.app import build_app
from tests.cluster.served import simulator


class _Driver:
    def get_job_id(self) -> str:
        return "01000000"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve asks who deploys, and Ray would start a cluster to be able to tell."""
    monkeypatch.setattr(ray, "get_runtime_context", _Driver)


def deployed(args: dict[str, Any], *, code_version: str = "of all") -> dict[str, DeploymentConfig]:
    """What reaches Serve's controller, by deployment: its own way from the application to the bytes."""
    built = build(build_app(args), name="blaze", default_runtime_env={})
    return {
        deployment.name: DeploymentConfig.from_proto_bytes(
            get_deploy_args(
                name=deployment.name,
                replica_config=deployment._replica_config,
                deployment_config=deployment._deployment_config,
                version=code_version,
            )["deployment_config_proto_bytes"]
        )
        for deployment in built.deployments
    }


def versions(args: dict[str, Any], **options: Any) -> dict[str, str]:
    return {name: str(config.version) for name, config in deployed(args, **options).items()}


def config(*models: dict[str, Any], **router: Any) -> dict[str, Any]:
    return {"router": router, "models": list(models)}


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The deployments that get another version."""
    old, new = versions(before), versions(after, code_version="another one of all")
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


BOTH = (simulator("one", seed=1), simulator("two", seed=2))


def test_the_same_config_replaces_nothing() -> None:
    assert changed(config(*BOTH), config(*BOTH)) == set()


def test_other_weights_of_one_model_leave_the_other_alone() -> None:
    assert changed(config(*BOTH), config(simulator("one", seed=3), BOTH[1])) == {"simulator-one"}


@pytest.mark.parametrize(
    "change",
    [
        {"replicas": 4},
        {"replicas": None, "autoscaling": {"max_replicas": 3}},
        {"weight": 0.5},
        {"max_in_flight": 3},
        {"max_surge_percent": 100},
    ],
)
def test_how_a_model_is_used_restarts_none_of_its_replicas(change: dict[str, Any]) -> None:
    assert changed(config(*BOTH), config(BOTH[0] | change, BOTH[1])) <= {"Router"}


@pytest.mark.parametrize("change", [{"replicas": 4}, {"max_surge_percent": 100}])
def test_how_many_replicas_there_are_does_not_concern_the_routers(change: dict[str, Any]) -> None:
    assert changed(config(*BOTH), config(BOTH[0] | change, BOTH[1])) == set()


def test_how_much_a_replica_does_at_once_concerns_the_routers() -> None:
    after = config(simulator("one", seed=1, slots=3), BOTH[1])
    assert changed(config(*BOTH), after) == {"simulator-one", "Router"}


def test_settings_of_the_router_replace_it_alone() -> None:
    assert changed(config(*BOTH), config(*BOTH, strategy="adaptive")) == {"Router"}


def test_the_number_of_routers_replaces_no_engine() -> None:
    assert changed(config(*BOTH), config(*BOTH, replicas=2)) == {"Router"}


def test_another_text_in_restart_replaces_the_replicas_of_that_model() -> None:
    assert changed(config(*BOTH), config(BOTH[0] | {"restart": "again"}, BOTH[1])) == {"simulator-one"}


def test_settings_of_the_health_actor_replace_those_who_follow_them() -> None:
    after = config(*BOTH) | {"health": {"probe_period_s": 2.0}}
    assert changed(config(*BOTH), after) == {"Health", "Router", "simulator-one", "simulator-two"}


def test_a_model_that_comes_leaves_the_others_alone() -> None:
    assert changed(config(BOTH[0]), config(*BOTH)) == {"simulator-two", "Router", "Health"}


def test_weights_that_are_written_over_in_place_are_other_weights(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    model = {"name": "m", "engine": "llm", "source": str(tmp_path)}
    before = versions(config(model, BOTH[0]))
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    after = versions(config(model, BOTH[0]))
    assert {name for name in before if before[name] != after[name]} == {"llm-m"}


def test_there_is_always_room_for_the_next_version_before_the_old_one_goes() -> None:
    built = deployed(config(simulator("one", replicas=1), simulator("two", replicas=4)))
    for name in ("simulator-one", "simulator-two", "Router"):
        assert built[name].max_surge_percent == 25  # of one replica, rounded up: one
    # Of two health actors each would miss half of the heartbeats.
    assert built["Health"].max_surge_percent == 0


def test_a_model_without_room_to_spare_is_replaced_in_place() -> None:
    assert deployed(config(simulator() | {"max_surge_percent": 0}))["simulator-sim"].max_surge_percent == 0


def test_replicas_that_stop_have_the_time_that_their_last_request_may_take() -> None:
    built = deployed(config(simulator(), request_timeout_s=100.0))
    assert built["simulator-sim"].graceful_shutdown_timeout_s == 130.0
    assert built["Router"].graceful_shutdown_timeout_s >= 130.0 + 30.0  # HAProxy sends it requests until then


def test_a_version_that_does_not_start_is_given_up() -> None:
    for each in deployed(config(simulator())).values():
        assert each.max_constructor_retry_count == 6


def test_the_default_config_is_replaced_on_the_two_cpus_that_it_is_made_for() -> None:
    loaded = yaml.safe_load((Path(__file__).parents[2] / "serve_config.yaml").read_text(encoding="utf-8"))
    (application,) = loaded["applications"]
    needed = 0.0
    for deployment in build(build_app(application["args"]), name="blaze", default_runtime_env={}).deployments:
        settings = deployment._deployment_config
        replicas = settings.num_replicas + math.ceil(settings.num_replicas * settings.max_surge_percent / 100)
        needed += replicas * deployment.ray_actor_options["num_cpus"]
    assert 0 < needed <= 2
