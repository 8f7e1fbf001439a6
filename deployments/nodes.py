"""The nodes of the cluster, as Ray knows them."""

from __future__ import annotations

import asyncio


async def nodes_of_ray() -> frozenset[str]:
    """The ids of those that live. Asks Ray's control store, which takes its time: off the event loop."""
    import ray

    nodes = await asyncio.to_thread(ray.nodes)
    return frozenset(node["NodeID"] for node in nodes if node["Alive"])
