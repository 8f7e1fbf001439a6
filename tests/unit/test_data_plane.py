"""What a message between replicas can carry."""

from __future__ import annotations

import pytest

from blaze.config import RouterConfig
from blaze.errors import ConfigError
from deployments.app import build_app
from deployments.data_plane import check_bodies_fit, check_requests_outlive_updates, fast_data_plane
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


HARD_STOP = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"


@pytest.mark.usefixtures("fast")
def test_requests_that_would_not_outlive_an_update_are_refused_at_deployment_by_name() -> None:
    args = {"models": [simulator()], "router": {"request_timeout_s": 606.0}}
    with pytest.raises(ConfigError, match=rf"router\.request_timeout_s: 606 .*605 s.*{HARD_STOP} \(720\)"):
        build_app(args)
    build_app(args | {"router": {"request_timeout_s": 605.0}})
    build_app({"models": [simulator()]})


@pytest.mark.parametrize("timeout_s", [0.5, 600.0, 605.1, 3600.0, 100_000.0])
def test_a_cluster_is_started_for_the_requests_of_its_config(
    timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in fast_data_plane(request_timeout_s=timeout_s).items():
        monkeypatch.setenv(name, value)
    check_requests_outlive_updates(timeout_s)
    assert 720 <= int(fast_data_plane()[HARD_STOP]) < max(721, timeout_s + 117)


def test_what_is_longer_than_haproxy_can_wait_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fast_data_plane(request_timeout_s=1e12).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"request_timeout_s"):
        check_requests_outlive_updates(1e12)


def test_what_was_set_where_ray_is_started_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HARD_STOP, "5000")
    assert fast_data_plane(request_timeout_s=9000.0)[HARD_STOP] == "5000"


def test_without_haproxy_requests_may_take_as_long_as_they_like() -> None:
    check_requests_outlive_updates(1e12)
