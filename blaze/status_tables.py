"""What `blaze status` prints."""

from __future__ import annotations

from typing import Any

from rich.table import Table

_NODE_LETTERS = 8  # of 56: enough to tell nodes apart

_REPLICA_COLUMNS = (
    *("replica", "model", "node", "pid", "state", "breaker"),
    *("in flight", "weight", "EWMA", "cost", "requests", "failures", "memory"),
)


def status_tables(body: dict[str, Any]) -> tuple[Table, Table]:
    title = f"Blaze {body['version']}{', draining' if body['draining'] else ''}"
    models = Table("model", "engine", "strategy", "ready", "waiting", title=title)
    for model in body["models"]:
        ready = f"{model['ready']}/{model['replicas']}"
        models.add_row(model["name"], model["engine"], model["strategy"], ready, str(model["waiting"]))
    replicas = Table(*_REPLICA_COLUMNS)
    for replica in body["replicas"]:
        replicas.add_row(*_replica_row(replica))
    return models, replicas


def _replica_row(replica: dict[str, Any]) -> tuple[str, ...]:
    return (
        replica["id"],
        replica["model"],
        replica["node"][:_NODE_LETTERS],
        str(replica["pid"]),
        replica["state"],
        replica["breaker"],
        str(replica["in_flight"]),
        "" if replica["weight"] is None else f"{replica['weight']:g}",
        "" if replica["ewma_ms"] is None else f"{replica['ewma_ms']:.0f} ms",
        f"{replica['cost']:.0f}",
        str(replica["requests"]),
        str(replica["failures"]),
        f"{replica['memory_bytes'] / 2**20:.0f} MiB",
    )
