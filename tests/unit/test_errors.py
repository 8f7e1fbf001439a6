from __future__ import annotations

import pickle

import pytest

from blaze import errors
from blaze.errors import BlazeError, ContextLengthExceeded, ErrorInfo, ModelNotFound, RemoteError
from blaze.reports import EngineStatus
from blaze.types import (
    ChatPrompt,
    ChoiceFinished,
    EngineKind,
    Event,
    Failed,
    Finished,
    ImageReady,
    Progress,
    Started,
    TextDelta,
    TokenLogprob,
    Usage,
)
from tests.samples import heartbeat, image_request, text_request

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BlazeError)]
PLAIN = [kind for kind in TREE if kind not in (RemoteError, ContextLengthExceeded, ModelNotFound)]


@pytest.mark.parametrize("kind", PLAIN)
def test_info_tells_everything_and_survives_the_way_to_another_process(kind: type[BlazeError]) -> None:
    error = kind("what happened", param="field", retry_after_s=2.5)
    info: ErrorInfo = pickle.loads(pickle.dumps(error.info))
    assert info == ErrorInfo(
        message="what happened",
        type=kind.type,
        code=kind.code,
        param="field",
        http_status=kind.http_status,
        retryable=kind.retryable,
        is_failure=kind.is_failure,
        replica_gone=kind.replica_gone,
        retry_after_s=2.5,
    )
    assert RemoteError(info).info == info
    assert str(RemoteError(info)) == "what happened"


@pytest.mark.parametrize("kind", TREE)
def test_client_errors_are_never_retried_and_never_held_against_a_replica(kind: type[BlazeError]) -> None:
    if 400 <= kind.http_status < 500:
        assert not kind.retryable
        assert not kind.is_failure


@pytest.mark.parametrize("kind", TREE)
def test_what_counts_against_a_replica_is_a_server_error(kind: type[BlazeError]) -> None:
    if kind.is_failure:
        assert kind.http_status >= 500


def test_case_05_the_context_error_names_its_three_numbers() -> None:
    info = ContextLengthExceeded(limit=100, prompt_tokens=90, requested_tokens=50, param="messages").info
    assert (info.http_status, info.code, info.param) == (400, "context_length_exceeded", "messages")
    assert all(number in info.message for number in ("100", "90", "50"))
    without = ContextLengthExceeded(limit=100, prompt_tokens=120, requested_tokens=None, param="prompt").info
    assert "None" not in without.message


def test_case_46_an_unknown_model_is_echoed_truncated() -> None:
    info = ModelNotFound("x" * 10_000).info
    assert (info.http_status, info.code, info.param) == (404, "model_not_found", "model")
    assert len(info.message) < 200


EVENTS: list[Event] = [
    Started((1, 2)),
    TextDelta(1, "é", (3,), (TokenLogprob("é", 3, -0.5),)),
    ChoiceFinished(0, "length"),
    ImageReady(0, b"\x00\xff", "webp", 8, 16, -1),
    Progress(1, 20),
    Finished(Usage(prompt_tokens=1, completion_tokens=2, images=3, cached_tokens=4)),
    Failed(errors.EngineFailure("broke").info),
]


@pytest.mark.parametrize("event", EVENTS)
def test_events_survive_the_way_to_another_process(event: Event) -> None:
    assert pickle.loads(pickle.dumps(event)) == event


def test_requests_and_reports_survive_the_way_to_another_process() -> None:
    for value in (text_request(stop=("a",), seed=1), image_request(n=2), heartbeat()):
        assert pickle.loads(pickle.dumps(value)) == value
    assert isinstance(text_request().prompt, ChatPrompt)


def test_pending_work_is_what_runs_and_what_waits() -> None:
    assert EngineStatus(EngineKind.LLM, "busy", 2, 3, 0, None).work_pending == 5
