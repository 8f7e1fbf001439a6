"""What comes back from a replica over Serve: events, or one of Blaze's own errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from blaze.errors import EngineFailure
from blaze.types import Finished, Usage
from deployments.pool import RayReplicaCall


async def gives(*messages: Any) -> AsyncIterator[Any]:
    for message in messages:
        yield message


def call(*messages: Any) -> RayReplicaCall:
    return RayReplicaCall(gives(*messages), lambda: None)


async def test_events_pass() -> None:
    batch = (Finished(Usage()),)
    assert [events async for events in call(batch)] == [batch]


@pytest.mark.parametrize(
    "garbage", [None, "done", (), ("garbage",), [Finished(Usage())], (Finished(Usage()), None)]
)
async def test_what_is_no_batch_of_events_is_the_replicas_failure(garbage: object) -> None:
    with pytest.raises(EngineFailure) as caught:
        await anext(call(garbage))
    assert caught.value.is_failure
    assert caught.value.retryable
    assert "garbage" not in caught.value.message, "what a replica says is for the log"
