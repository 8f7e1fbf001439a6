"""Blaze: one OpenAI-compatible endpoint for language and diffusion models on a Ray cluster.

>>> import blaze
>>> client = blaze.connect()                                      # a running cluster
>>> client.generate("smollm2-135m", "What is the capital of France?").text

:class:`blaze.manager.EngineManager`, here as ``blaze.EngineManager``, is for engines in one process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blaze.version import __version__

if TYPE_CHECKING:
    from blaze.client import Client
    from blaze.manager import EngineManager

__all__ = ["EngineManager", "__version__", "connect"]


def connect(address: str | None = None, *, app_name: str = "blaze") -> Client:
    """A client over a Serve handle of a running Blaze application.

    ``address``: a Ray address; by default RAY_ADDRESS, then a cluster that `blaze up` started on this
    machine, then any Ray on this machine. Raises :class:`blaze.errors.EnvironmentProblem` when there is
    no cluster or no such application.
    """
    from blaze.client import connect as _connect  # noqa: PLC0415 - Ray is loaded only when it is used

    return _connect(address, app_name=app_name)


def __getattr__(name: str) -> object:
    if name == "EngineManager":
        from blaze.manager import EngineManager as _EngineManager  # noqa: PLC0415 - only when it is used

        return _EngineManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
