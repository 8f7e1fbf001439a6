"""A model that has scaled to zero: the first request wakes it up and is answered."""

from __future__ import annotations

import httpx
import pytest

from tests.cluster.served import served, simulator
from tests.waiting import eventually

pytestmark = pytest.mark.cluster


def test_case_25_the_first_request_wakes_the_model_and_it_goes_back_to_sleep() -> None:
    model = simulator("sleepy", tokens=2)
    del model["replicas"]
    model["autoscaling"] = {
        "min_replicas": 0,
        "max_replicas": 1,
        "upscale_delay_s": 0,
        "downscale_delay_s": 2,
    }
    with served([model]) as app:

        def asleep() -> bool:
            deployments = app.cluster.progress().deployments
            return any(d.name == "simulator-sleepy" and d.running == d.wanted == 0 for d in deployments)

        eventually(asleep, within_s=60, every_s=0.5)
        assert httpx.get(f"{app.url}/ready").status_code == 200  # it may be at zero
        body = {"model": "sleepy", "messages": [{"role": "user", "content": "hi"}]}
        response = httpx.post(f"{app.url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
        eventually(asleep, within_s=60, every_s=0.5)
