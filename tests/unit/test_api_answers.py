from __future__ import annotations

import base64
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from blaze.types import ChoiceFinished, Finished, ImageReady, Started, TextDelta, Usage
from tests.api_bench import ApiBench, error_of
from tests.fakes import FakePool, Script
from tests.samples import heartbeat, image_answer

# --- Whole answers -----------------------------------------------------------------------------------


async def test_a_chat_answer_in_openais_shape() -> None:
    async with ApiBench() as api:
        body = (await api.chat()).json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{16,}", body.pop("id"))
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ok"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 1,
            "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_a_completion_in_openais_shape() -> None:
    async with ApiBench() as api:
        body = (await api.complete()).json()
    assert re.fullmatch(r"cmpl-[0-9a-f]{16,}", body["id"])
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "ok", "logprobs": None, "finish_reason": "stop"}]


async def test_choices_are_put_together_from_their_pieces_in_order() -> None:
    batches: Script = [
        (Started((1,)), TextDelta(1, "b", (1,))),
        (TextDelta(0, "a", (1,)), TextDelta(1, "B", (2,)), ChoiceFinished(1, "length")),
        (TextDelta(0, "A", (2,)), ChoiceFinished(0, "stop"), Finished(Usage(1, 4))),
    ]
    async with ApiBench(FakePool(("a",), scripts={"a": [list(batches)]})) as api:
        choices = (await api.chat(n=2)).json()["choices"]
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in choices] == [
        (0, "aA", "stop"),
        (1, "bB", "length"),
    ]


async def test_a_prompt_that_is_given_back_is_text_but_not_usage() -> None:
    batches: Script = [
        (Started((1, 2)), TextDelta(0, "Once", (1, 2), echo=True), TextDelta(0, " upon", (3,))),
        (ChoiceFinished(0, "length"), Finished(Usage(2, 1, cached_tokens=1))),
    ]
    async with ApiBench(FakePool(("a",), scripts={"a": [list(batches)]})) as api:
        body = (await api.complete(echo=True, max_tokens=1)).json()
    assert body["choices"][0]["text"] == "Once upon"
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (2, 1)
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


async def test_an_answer_without_text_is_an_empty_string() -> None:
    batches: Script = [
        (Started((1,)), TextDelta(0, "", (0,)), ChoiceFinished(0, "stop"), Finished(Usage(1, 1)))
    ]
    async with ApiBench(FakePool(("a",), scripts={"a": [list(batches)]})) as api:
        assert (await api.chat()).json()["choices"][0]["message"]["content"] == ""


async def test_images_come_in_order_with_the_seeds_that_draw_them_again() -> None:
    shuffled: Script = [
        (Started(), ImageReady(1, b"second", "png", 32, 16, 8)),
        (ImageReady(0, b"first", "png", 32, 16, 7), Finished(Usage(images=2))),
    ]
    async with ApiBench(images=FakePool(("x",), scripts={"x": [list(shuffled)]})) as api:
        body = (await api.draw(n=2, seed=7)).json()
    assert [base64.b64decode(image["b64_json"]) for image in body["data"]] == [b"first", b"second"]
    assert [image["seed"] for image in body["data"]] == [7, 8]
    assert (body["size"], body["output_format"]) == ("32x16", "png")


# --- Headers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_names_its_request_and_its_replica(stream: bool) -> None:
    async with ApiBench() as api:
        first = await api.chat(stream=stream)
        second = await api.chat(stream=stream)
    assert first.headers["x-blaze-replica"] == "a"
    ids = {first.headers["x-request-id"], second.headers["x-request-id"]}
    assert len(ids) == 2
    assert {request.request_id for request in api.sent} == ids


@pytest.mark.parametrize("path", ["/health", "/v1/nope", "/v1/models", "/v1/chat/completions"])
async def test_errors_and_pages_without_a_replica_name_the_request_too(path: str) -> None:
    async with ApiBench() as api:
        response = await api.http.get(path)
    assert response.headers["x-request-id"]
    assert "x-blaze-replica" not in response.headers


async def test_the_callers_own_request_id_is_kept() -> None:
    async with ApiBench() as api:
        response = await api.http.get("/health", headers={"x-request-id": "mine-42"})
    assert response.headers.get_list("x-request-id") == ["mine-42"]


@pytest.mark.parametrize("given", [b"", b"two words", b"x" * 129, b"tab\there", "é".encode()])
async def test_a_request_id_that_no_header_or_log_should_carry_is_replaced(given: bytes) -> None:
    async with ApiBench() as api:
        response = await api.http.get("/health", headers=[(b"x-request-id", given)])
    assert re.fullmatch(r"[0-9a-f]{16,}", response.headers["x-request-id"])


async def test_a_server_that_names_requests_itself_is_left_to_it() -> None:
    async with ApiBench(echo_request_id=False) as api:
        response = await api.chat()
    assert "x-request-id" not in response.headers
    assert response.headers["x-blaze-replica"] == "a"


# --- About the service -------------------------------------------------------------------------------


async def test_models_are_listed_and_found_by_name() -> None:
    async with ApiBench() as api:
        listed = (await api.http.get("/v1/models")).json()
        found = (await api.http.get("/v1/models/m")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["m", "d"]
    assert found == {"id": "m", "object": "model", "created": 1_700_000_000, "owned_by": "blaze"}
    assert found in listed["data"]


async def test_a_model_name_with_a_slash_is_found() -> None:
    async with ApiBench(model="org/model") as api:
        assert (await api.http.get("/v1/models/org/model")).json()["id"] == "org/model"
        error_of(await api.http.get("/v1/models/org"))


async def test_health_answers_whatever_the_models_do() -> None:
    async with ApiBench(FakePool(())) as api:
        assert (await api.http.get("/health")).status_code == 200


async def test_ready_names_the_models_without_a_replica() -> None:
    async with ApiBench(FakePool(())) as api:
        response = await api.http.get("/ready")
        assert (response.status_code, response.json()) == (
            503,
            {"ready": False, "missing": ["m"], "draining": False},
        )
        api.pool.set_live("a")
        response = await api.http.get("/ready")
        assert (response.status_code, response.json()) == (
            200,
            {"ready": True, "missing": [], "draining": False},
        )


async def test_metrics_are_prometheus_text() -> None:
    async with ApiBench() as api:
        await api.chat()
        response = await api.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name for family in text_string_to_metric_families(response.text)}
    assert {"blaze_requests", "blaze_tokens", "blaze_in_flight_requests"} <= families


async def test_status_counts_what_was_answered() -> None:
    async with ApiBench(images=FakePool(("x",), scripts={"x": [image_answer(1)]})) as api:
        await api.chat()
        await api.chat(max_tokens=0)  # refused before any replica
        await api.draw()
        api.service.heartbeat(heartbeat("a"))
        body = (await api.http.get("/api/v1/blaze/status")).json()
    assert body["ready"] is True
    assert [model["requests"]["success"] for model in body["models"]] == [1, 1]
    assert [(row["id"], row["state"], row["requests"]) for row in body["replicas"]] == [("a", "ready", 1)]
