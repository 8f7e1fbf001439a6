"""A Ray cluster of one's own on this machine: started, watched, and stopped without a trace.

Every process of the cluster inherits a marker in its environment. Stopping ends all processes that carry
it and no others, whatever state the start had got to.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from blaze.config import APP_NAME
from blaze.errors import ConfigError, EnvironmentProblem
from deployments.data_plane import REPLICA_PORTS, fast_data_plane, private_proxy

MARKER = "BLAZE_CLUSTER_ID"
_OBJECT_STORE_BYTES = 512 * 1024 * 1024
_START_ATTEMPTS = 2
_given: deque[int] = deque(maxlen=1000)  # single ports: whoever got one may bind it much later


@dataclass(frozen=True, slots=True)
class DeploymentProgress:
    name: str
    running: int
    wanted: int
    message: str


@dataclass(frozen=True, slots=True)
class ApplicationProgress:
    status: str  # Serve's: NOT_STARTED, DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, ...
    message: str
    deployments: tuple[DeploymentProgress, ...]


class LocalCluster:
    """A context manager: inside it a Ray cluster runs on 127.0.0.1; after it nothing of it is left."""

    def __init__(
        self, *, num_cpus: int | None = None, fast: bool = True, request_timeout_s: float = 0.0
    ) -> None:
        """``request_timeout_s``: as in :func:`fast_data_plane`."""
        self.cluster_id = uuid.uuid4().hex
        self._num_cpus = num_cpus
        self._request_timeout_s = request_timeout_s
        self._fast = fast
        self._folder = Path(tempfile.gettempdir()) / f"blaze-{self.cluster_id[:8]}"
        self._before: dict[str, str | None] = {}
        self.address = ""
        self.dashboard = ""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Whoever calls it also calls :meth:`stop`, even when this raises or is cut off."""
        self._set_environment()
        try:
            import ray
            from ray._private import ray_constants
        except ImportError as error:
            raise EnvironmentProblem(f"Ray is not installed: {error}") from None
        # Ray read the variable when it was imported, which may have been before it was set.
        ray_constants.ENABLE_RAY_CLUSTER = False
        for attempt in range(_START_ATTEMPTS):
            try:
                self._start_ray()
                return
            except Exception as error:  # Ray raises the bare class when its node does not come up in time
                # Ray draws most of its ports itself, and may lose one before it has bound it.
                if attempt + 1 == _START_ATTEMPTS:
                    reason = " ".join(str(error).split())[:500]
                    raise EnvironmentProblem(f"Ray did not start: {reason}") from error
                ray.shutdown()
                sweep(self.cluster_id)

    def _start_ray(self) -> None:
        import ray

        dashboard_port = free_port()
        # Unless RAY_AUTH_MODE says otherwise, a new local Ray asks for the user's token on all its ports,
        # which it makes when there is none. It also guards the calls between replicas, for which Serve
        # listens on every interface.
        context = ray.init(
            address="local",
            num_cpus=self._num_cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=dashboard_port,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="error",
            _node_ip_address="127.0.0.1",
            _temp_dir=str(self._folder / "ray"),
        )
        self.address = context.address_info["gcs_address"]
        self.dashboard = f"http://127.0.0.1:{dashboard_port}"

    def _set_environment(self) -> None:
        """Ray's processes inherit it; it is put back when the cluster stops."""
        # Ray opens its own folders to every user of the machine; this one around them is ours alone.
        self._folder.mkdir(mode=0o700)
        no_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1,localhost")))
        variables = {
            MARKER: self.cluster_id,
            "RAY_USAGE_STATS_ENABLED": "0",
            "NO_PROXY": no_proxy,  # Ray's clients would ask a company's proxy for 127.0.0.1
            "no_proxy": no_proxy,
            # Ray turns 127.0.0.1 into the machine's outer address, unless it is told that this machine
            # takes part in no cluster of several (the flag is named after the systems it was made for).
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        if self._fast:
            variables |= fast_data_plane(request_timeout_s=self._request_timeout_s)
            variables |= private_proxy(
                self._folder / "haproxy",
                metrics_port=free_port(),
                stats_port=free_port(),
                fallback_port=free_port(),
                replica_ports=free_block(REPLICA_PORTS),
            )
        for name, value in variables.items():
            self._before[name] = os.environ.get(name)
            os.environ[name] = value

    def deploy(self, serve_config: Mapping[str, Any]) -> None:
        """What `serve deploy` does. Raises :class:`ConfigError` when Serve refuses the file, and
        :class:`EnvironmentProblem` when it does not answer."""
        try:
            self._submission().deploy_applications(dict(serve_config))
        except OSError as error:
            raise EnvironmentProblem(f"Ray's dashboard does not answer: {error}") from error
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"Serve refuses the config: {error}") from None

    def progress(self, app_name: str = APP_NAME) -> ApplicationProgress:
        """Raises :class:`EnvironmentProblem` when Ray does not answer; it may the next time."""
        try:
            details = self._submission().get_serve_details()
        except (OSError, RuntimeError, ValueError) as error:
            raise EnvironmentProblem(f"Ray's dashboard does not answer: {error}") from error
        application = details.get("applications", {}).get(app_name)
        if application is None:
            return ApplicationProgress("NOT_STARTED", "", ())
        deployments = tuple(
            DeploymentProgress(
                name=name,
                running=sum(replica["state"] == "RUNNING" for replica in deployment["replicas"]),
                wanted=int(deployment["target_num_replicas"]),
                message=deployment["message"],
            )
            for name, deployment in application["deployments"].items()
        )
        return ApplicationProgress(application["status"], application["message"], deployments)

    def _submission(self) -> Any:
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        return ServeSubmissionClient(self.dashboard)

    def is_alive(self) -> bool:
        """Ray's control store takes connections."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5.0).close()
        except OSError:
            return False
        return True

    def disconnect(self) -> None:
        """The first part of :meth:`stop`. Ray resets the handler of SIGTERM in it."""
        try:
            import ray

            ray.shutdown()
        except Exception as error:  # a start that was cut off leaves Ray in any state: the sweep decides
            print(f"ray.shutdown: {error}")  # noqa: T201

    def stop(self) -> None:
        """End every process of the cluster. Safe at any time, more than once."""
        self.disconnect()
        sweep(self.cluster_id)
        shutil.rmtree(self._folder, ignore_errors=True)
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._before.clear()


def sweep(cluster_id: str, *, patience_s: float = 3.0) -> None:
    """End all processes that carry the cluster's marker: first asked, then killed, until none is left."""
    asked_at: float | None = None
    for _ in range(600):  # bounded: a process that cannot be killed must not hang us for ever
        left = list(processes(cluster_id))
        if not left:
            return
        if asked_at is None:
            asked_at = time.monotonic()
        for process in left:
            try:
                if time.monotonic() - asked_at > patience_s:
                    process.kill()
                else:
                    process.terminate()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(left, timeout=0.2)


def processes(cluster_id: str) -> Iterator[psutil.Process]:
    """Living processes other than this one that carry the cluster's marker."""
    me = os.getpid()
    for process in psutil.process_iter():
        if process.pid == me:
            continue
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARKER) == cluster_id:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def free_port() -> int:
    """A port that nobody listens on, outside the range from which the system gives out ports; in this
    process another one each time.

    From inside it, one of Ray's own processes could take the port before its owner has bound it.
    """
    port = _first_free([port for port in range(8_100, 10_000) if port not in _given], 1)
    _given.append(port)
    return port


def free_block(size: int) -> int:
    """The first of ``size`` ports in a row that nobody listens on, apart from those of :func:`free_port`."""
    return _first_free(range(10_000, 32_000, size), size)


def _first_free(starts: Sequence[int], size: int) -> int:
    for start in random.SystemRandom().sample(starts, len(starts)):
        if all(_is_free(port) for port in range(start, start + size)):
            return start
    raise EnvironmentProblem(f"there are no {size} free ports in a row between {starts[0]} and {starts[-1]}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
