"""The Router: HTTP ingress, handle methods, and the dispatcher behind both."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from blaze.api.app import create_app
from blaze.config import BlazeConfig
from blaze.control import Change
from blaze.errors import BlazeError, ErrorInfo
from blaze.routing.affinity import LOOPBACK, parse_networks
from blaze.types import Events, Failed, Request
from deployments.data_plane import clients_are_known
from deployments.nodes import nodes_of_ray
from deployments.service import ClusterService


@serve.ingress()  # the application is made in __serve_build_asgi_app__, when the dispatcher is there
class Router:
    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: BlazeConfig, engines: dict[str, DeploymentHandle], health: DeploymentHandle
    ) -> None:
        self._config = config.router
        me = serve.get_replica_context().replica_tag
        self._service = ClusterService(config, engines, health, me, nodes_of_ray)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        # Serve's own middleware gives every response its x-request-id.
        return create_app(
            self._service,
            max_body_bytes=self._config.max_body_bytes,
            echo_request_id=False,
            # HAProxy and other proxies of this machine speak from here.
            trusted_proxies=(*LOOPBACK, *parse_networks(self._config.trusted_proxies))
            if clients_are_known()
            else None,
            keys=self._config.api_keys,
        )

    async def stream(self, request: Request) -> AsyncGenerator[Events]:
        """Handle calls: batches of events, the last of which ends with ``Finished`` or ``Failed``."""
        try:
            opened = await self._service.open(request)
        except BlazeError as error:
            yield (Failed(error.info),)
            return
        async with opened:
            async for events in opened:
                yield events

    async def change(self, change: Change) -> ErrorInfo | None:
        """Handle calls of operators: done, or why not."""
        try:
            await self._service.change(change)
        except BlazeError as error:
            return error.info
        return None

    async def status(self) -> dict[str, Any]:
        return await self._service.status()
