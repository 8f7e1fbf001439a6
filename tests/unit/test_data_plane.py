"""What a message between replicas can carry."""

from __future__ import annotations

import pytest

from blaze.config import RouterConfig
from blaze.errors import ConfigError
from deployments.app import build_app
from deployments.data_plane import check_bodies_fit, fast_data_plane
from tests.cluster.served import simulator

LENGTH = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"


@pytest.fixture(autouse=True)
def _no_ray_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in fast_data_plane():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fast_data_plane().items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("fast")
def test_bodies_of_the_default_size_fit_several_times_into_a_message() -> None:
    check_bodies_fit(8 * RouterConfig().max_body_bytes)


@pytest.mark.usefixtures("fast")
def test_bodies_that_do_not_fit_are_refused_at_deployment_by_name() -> None:
    args = {"models": [simulator()], "router": {"max_body_bytes": 256 * 2**20}}
    with pytest.raises(ConfigError, match=r"router\.max_body_bytes.*268435456"):
        build_app(args)
    args["router"] = {"max_body_bytes": 255 * 2**20}
    build_app(args)


@pytest.mark.parametrize("name", ["RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_USE_GRPC_BY_DEFAULT"])
def test_rays_own_limit_is_too_small_where_it_was_left_as_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=LENGTH):
        check_bodies_fit(RouterConfig().max_body_bytes)
    monkeypatch.setenv(LENGTH, str(2**25))
    check_bodies_fit(RouterConfig().max_body_bytes)


def test_without_grpc_there_is_no_limit() -> None:
    check_bodies_fit(2**40)
