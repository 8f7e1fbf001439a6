"""What is done to a cluster: by signals, over a handle, by the management API."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import psutil

from blaze.config import APP_NAME
from blaze.engines.faults import Faults
from tests.chaos.schedule import SeenReplica
from tests.cluster.served import Served

_PATIENCE_S = 10.0
_TOLD = 20  # events
_PAUSE = re.compile(r"no other for ([\d.]+) s")  # as the health actor says it of a restart
STRATEGIES = ("round_robin", "least_connections", "least_response_time", "ip_hash", "adaptive")


class Effects:
    """On one cluster, for all runs on it: each redeploys what the one before has left."""

    def __init__(self, app: Served) -> None:
        self._app = app
        self._config = copy.deepcopy(app.config)
        self._places: dict[str, tuple[str, int]] = {}  # of all replicas that were seen: model and rank

    # --- What there is -----------------------------------------------------------------------------------

    def replicas(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.status()["replicas"]
        return found

    def status(self) -> dict[str, Any]:
        return self._app.status()

    def seen(self) -> list[SeenReplica]:
        status = self.status()
        self._places.update({r["id"]: (r["model"], r["rank"]) for r in status["replicas"]})
        pauses = pauses_of(status["events"], self._places)
        return [
            SeenReplica(
                r["id"],
                r["model"],
                healthy=r["state"] == "ready" and r["breaker"] == "closed",
                working=r["running"] + r["queued"] > 0,
                pause_s=pauses.get((r["model"], r["rank"]), 0.0),
            )
            for r in status["replicas"]
        ]

    def told_of(self, model: str) -> list[str]:
        """What was found and decided lately about its replicas."""
        found = [e for e in self.status()["events"] if e["about"] == "replica" and e["model"] == model]
        return [
            f"{e['age_s']:.0f} s ago: {e['replica_id']} {self._places.get(e['replica_id'])}"
            f" {e['before']} -> {e['after']}: {e['reason']}"
            for e in found[-_TOLD:]
        ]

    def process(self, replica_id: str) -> psutil.Process:
        """Also later it is never another one of the same pid."""
        return psutil.Process(next(int(r["pid"]) for r in self.replicas() if r["id"] == replica_id))

    def routers(self) -> list[psutil.Process]:
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        details = ServeSubmissionClient(self._app.cluster.dashboard).get_serve_details()
        routers = details["applications"][APP_NAME]["deployments"]["Router"]["replicas"]
        pids = sorted(int(r["pid"]) for r in routers if r["state"] == "RUNNING" and r.get("pid"))
        return [psutil.Process(pid) for pid in pids]

    def is_deployed(self) -> bool:
        return self._app.cluster.progress().status == "RUNNING"

    # --- What is done ------------------------------------------------------------------------------------

    async def set_faults(self, model: str, replica_id: str, faults: Faults) -> None:
        """All of them on one event loop: Serve's handles are bound to theirs."""
        from ray import serve

        handle = serve.get_deployment_handle(f"simulator-{model}", APP_NAME)
        method = handle.options(method_name="set_faults")
        await asyncio.wait_for(method.remote(faults, blaze_pin=replica_id), _PATIENCE_S)

    def drain(self, replica_id: str, draining: bool) -> None:
        self._post(f"replicas/{replica_id}/drain", {"draining": draining})

    def set_strategy(self, model: str, strategy: str) -> None:
        self._post("strategy", {"model": model, "strategy": strategy})

    def redeploy(self) -> None:
        """With one more slot per simulator, or one less: everything gets a new version."""
        for model in self._models():
            if "simulator" in model:
                model["simulator"]["slots"] = 17 - model["simulator"]["slots"]
        self._app.cluster.deploy(self._config)

    def _models(self) -> Sequence[dict[str, Any]]:
        models: Sequence[dict[str, Any]] = self._config["applications"][0]["args"]["models"]
        return models

    def _post(self, path: str, body: dict[str, Any]) -> None:
        url = f"{self._app.url}/api/v1/blaze/{path}"
        httpx.post(url, json=body, timeout=_PATIENCE_S, trust_env=False).raise_for_status()


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pauses_of(
    events: Sequence[Mapping[str, Any]], places: Mapping[str, tuple[str, int]]
) -> dict[tuple[str, int], float]:
    """For how long the health actor will restart nobody in a place (model and rank): it has done so lately.
    ``events``: of a status, oldest first."""
    pauses = {}
    for event in events:
        said = _PAUSE.search(event.get("reason") or "")
        place = places.get(event["replica_id"])
        if said and place and event.get("after") == "restarting":
            pauses[place] = max(0.0, float(said[1]) - event["age_s"])
    return pauses
