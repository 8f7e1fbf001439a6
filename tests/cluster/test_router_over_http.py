"""The Router on a real cluster, over HTTP, with the simulator behind it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.cluster.served import Served, served, simulator
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

MESSAGES = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    models = [
        simulator("sim", ttft_ms=1, inter_token_ms=1, tokens=8),
        simulator("slow", ttft_ms=20, inter_token_ms=20, tokens=500, slots=4),
    ]
    with served(models, strategy="round_robin") as running:
        yield running


@pytest.fixture
def client(app: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{app.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def chat(app: Served, **fields: Any) -> httpx.Response:
    body = {"model": "sim", "messages": MESSAGES} | fields
    return httpx.post(f"{app.url}/v1/chat/completions", json=body, timeout=30)


def test_round_robin_splits_twenty_requests_ten_and_ten(app: Served) -> None:
    picks = Counter(chat(app).headers["x-blaze-replica"] for _ in range(20))
    assert sorted(picks.values()) == [10, 10]
    assert set(picks) == {replica["id"] for replica in app.replicas("sim")}


def test_every_response_has_one_request_id_and_echoes_the_callers(app: Served) -> None:
    for response in (
        chat(app),
        chat(app, model="nope"),
        httpx.get(f"{app.url}/health"),
        httpx.get(f"{app.url}/no"),
    ):
        assert len(response.headers.get_list("x-request-id")) == 1
    named = httpx.post(
        f"{app.url}/v1/chat/completions",
        json={"model": "sim", "messages": MESSAGES},
        headers={"x-request-id": "mine-42"},
    )
    assert named.headers.get_list("x-request-id") == ["mine-42"]


def test_the_openai_client_streams_what_it_gets_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="sim", messages=MESSAGES, seed=7)
    chunks = list(
        client.chat.completions.create(
            model="sim", messages=MESSAGES, seed=7, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        "stop"
    ]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_arrives_while_it_is_generated(app: Served, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="slow", messages=MESSAGES, stream=True, max_tokens=300)
    pieces = 0
    for chunk in stream:
        pieces += bool(chunk.choices[0].delta.content)
        if pieces == 3:
            # Of 300, 20 ms apart: had anybody on the way held them back, the replica would be done by now.
            assert app.in_flight() == 1
            break
    stream.close()
    eventually(lambda: app.in_flight() == 0, within_s=10)


def test_errors_reach_the_openai_client_as_its_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="sim", messages=MESSAGES, temperature=3)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError):
        client.images.generate(model="sim", prompt="a cat")


def test_an_error_before_the_first_token_is_no_event_stream(app: Served) -> None:
    response = chat(app, model="nope", stream=True)
    assert response.status_code == 404
    assert response.headers["content-type"].startswith("application/json")


def test_models_are_listed_and_looked_up(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["sim", "slow"]
    assert client.models.retrieve("slow").id == "slow"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../etc/passwd")


async def _leave_early(url: str, body: dict[str, Any], after_s: float) -> None:
    """Open a request and close the socket, whatever state it has got to."""
    host, port = url.removeprefix("http://").split(":")
    _reader, writer = await asyncio.open_connection(host, int(port))
    payload = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(head.encode() + f"content-length: {len(payload)}\r\n\r\n".encode() + payload)
    await writer.drain()
    await asyncio.sleep(after_s)
    writer.close()


async def test_case_15_clients_that_leave_give_everything_back(app: Served) -> None:
    rng = random.Random(15)
    for _ in range(25):  # 500 requests
        await asyncio.gather(
            *(
                _leave_early(
                    app.url,
                    {
                        "model": "slow",
                        "messages": MESSAGES,
                        "stream": rng.random() < 0.7,
                        "n": rng.choice((1, 2)),
                    },
                    rng.uniform(0, 0.05),
                )
                for _ in range(20)
            )
        )
    eventually(lambda: app.in_flight() == 0, within_s=10)
    eventually(lambda: app.working() == 0, within_s=10)
    assert sum(replica["failures"] for replica in app.replicas("slow")) == 0
    assert chat(app, model="slow", max_tokens=2).status_code == 200


def test_metrics_are_prometheus_text(app: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    chat(app)
    text = httpx.get(f"{app.url}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    successes = [
        sample.value
        for sample in families["blaze_requests"].samples
        if sample.labels == {"model": "sim", "outcome": "success"}
    ]
    assert successes[0] >= 1
    assert families["blaze_time_to_first_content_seconds"].type == "histogram"


def test_a_killed_replica_costs_no_request_and_comes_back(app: Served) -> None:
    before = {replica["id"]: replica["pid"] for replica in app.replicas("sim")}
    victim = next(iter(before))
    os.kill(before[victim], signal.SIGKILL)
    responses = [chat(app) for _ in range(10)]
    assert [response.status_code for response in responses] == [200] * 10
    assert victim not in {response.headers["x-blaze-replica"] for response in responses}

    def replaced() -> bool:
        ready = {replica["id"] for replica in app.replicas("sim") if replica["state"] == "ready"}
        return len(ready - {victim}) == 2

    eventually(replaced, within_s=60)
