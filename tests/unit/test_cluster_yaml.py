"""cluster.yaml is what Ray's cluster launcher accepts, and sets what Blaze needs on every node."""

from __future__ import annotations

import copy
import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deployments.data_plane import fast_data_plane

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return loaded


def exported(cluster: dict[str, Any], commands: str) -> dict[str, str]:
    """The variables that the `ray start` of these commands is given."""
    start = next(command for command in cluster[commands] if " start " in command)
    variables: dict[str, str] = {}
    for part in start.split(";"):
        words = shlex.split(part)
        if words[0] == "export":
            variables |= dict(word.split("=", 1) for word in words[1:])
    return variables


def test_it_satisfies_rays_own_schema(cluster: dict[str, Any]) -> None:
    ray = importlib.util.find_spec("ray")
    assert ray is not None and ray.origin is not None
    schema = Path(ray.origin).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text(encoding="utf-8")))


def test_ray_accepts_it_once_its_defaults_are_filled_in(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    # Nothing of the provider's defaults may bring another Ray onto the nodes.
    for commands in ("head_setup_commands", "worker_setup_commands"):
        assert not any("ray-wheels" in command or "anaconda" in command for command in prepared[commands])


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_gets_the_fast_data_plane_and_asks_for_the_token(
    cluster: dict[str, Any], commands: str
) -> None:
    assert exported(cluster, commands) == fast_data_plane() | {"RAY_AUTH_MODE": "token"}


def test_the_token_and_the_package_reach_every_node(cluster: dict[str, Any]) -> None:
    mounts = cluster["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    installs = [command for command in cluster["setup_commands"] if "blaze_serving" in command]
    assert len(installs) == 1
    for mounted in ("~/blaze/constraints.txt", "~/blaze/dist"):
        assert mounted in mounts and mounted in installs[0]


def test_there_is_a_head_and_groups_that_scale(cluster: dict[str, Any]) -> None:
    groups = cluster["available_node_types"]
    workers = {name: group for name, group in groups.items() if name != cluster["head_node_type"]}
    assert cluster["head_node_type"] in groups and len(workers) == 2
    gpu = [group for group in workers.values() if group["resources"].get("GPU")]
    cpu = [group for group in workers.values() if not group["resources"].get("GPU")]
    assert len(gpu) == len(cpu) == 1
    assert gpu[0]["min_workers"] == 0 < gpu[0]["max_workers"]
    assert cpu[0]["min_workers"] < cpu[0]["max_workers"]
    assert sum(group["max_workers"] for group in workers.values()) <= cluster["max_workers"]
