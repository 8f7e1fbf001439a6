"""Images over a Serve handle, with a handle that records what it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from blaze.client import Client
from blaze.errors import EngineFailure, InvalidRequest, RemoteError
from blaze.types import Event, Events, Failed, Finished, ImageReady, ImageRequest, Progress, Started, Usage
from tests.image_files import picture, with_hole
from tests.samples import partial_image

IMAGE = ImageReady(0, b"pixels", "png", 32, 16, 7)
ANSWER: tuple[Events, ...] = (
    (Started(), Progress(1, 2)),
    (partial_image(),),
    (IMAGE, Finished(Usage(images=1))),
)


class FakeResponses:
    def __init__(self, batches: tuple[Events, ...]) -> None:
        self._batches = batches
        self.cancelled = False

    def __iter__(self) -> Iterator[Events]:
        return iter(self._batches)

    def cancel(self) -> None:
        self.cancelled = True


class FakeHandle:
    """Of a Serve handle, what the client uses."""

    def __init__(self, *batches: Events) -> None:
        self.batches = batches or ANSWER
        self.requests: list[ImageRequest] = []
        self.responses: list[FakeResponses] = []

    def options(self, **_options: object) -> FakeHandle:
        return self

    def remote(self, request: ImageRequest) -> FakeResponses:
        self.requests.append(request)
        self.responses.append(FakeResponses(self.batches))
        return self.responses[-1]


def test_images_may_begin_with_an_image() -> None:
    handle = FakeHandle()
    images = Client(handle).images(
        "d", "seven", image=picture(), strength=0.5, adapters={"ink": 1}, scheduler="euler", timeout_s=3
    )
    assert images == [IMAGE]
    (request,) = handle.requests
    assert (request.image, request.mask, request.strength) == (picture(), None, 0.5)
    assert (request.adapters, request.scheduler, request.timeout_s) == ((("ink", 1),), "euler", 3)


@pytest.mark.parametrize(
    ("image", "mask", "sent"),
    [
        (picture(), None, None),
        (picture(), with_hole(), with_hole()),
        (with_hole(), None, with_hole()),
    ],
)
def test_an_edit_is_the_same_as_over_http(image: bytes, mask: bytes | None, sent: bytes | None) -> None:
    handle = FakeHandle()
    assert Client(handle).edit("d", image, "seven", mask=mask, seed=3) == [IMAGE]
    (request,) = handle.requests
    assert (request.image, request.mask, request.seed) == (image, sent, 3)


@pytest.mark.parametrize(
    ("progress", "shown"),
    [(True, [Progress(1, 2), partial_image(), IMAGE]), (False, [partial_image(), IMAGE])],
)
def test_a_stream_shows_previews_and_the_steps_that_were_asked_for(
    progress: bool, shown: list[Event]
) -> None:
    handle = FakeHandle()
    stream = Client(handle).image_stream("d", "seven", partial_images=1, progress=progress)
    assert list(stream) == shown
    assert (handle.requests[0].partial_images, handle.requests[0].progress) == (1, progress)
    assert not handle.responses[0].cancelled


def test_who_leaves_a_stream_cancels_the_request() -> None:
    handle = FakeHandle()
    stream: Any = Client(handle).image_stream("d", "seven", partial_images=1)
    assert next(stream) == partial_image()
    stream.close()
    assert handle.responses[0].cancelled


def test_errors_are_raised_also_after_a_preview() -> None:
    failed = Failed(EngineFailure("broke").info)
    stream = Client(FakeHandle((partial_image(),), (failed,))).image_stream("d", "seven", partial_images=1)
    assert next(stream) == partial_image()
    with pytest.raises(RemoteError, match="broke"):
        next(stream)


def test_what_is_wrong_is_refused_before_anything_is_sent() -> None:
    handle = FakeHandle()
    for refused in (
        lambda: Client(handle).images("d", "seven", strength=0.5),
        lambda: Client(handle).images("d", "seven", image="file.png"),
        lambda: Client(handle).edit("d", b"no picture", "seven"),
        lambda: list(Client(handle).image_stream("d", "seven", partial_images=4)),
    ):
        with pytest.raises(InvalidRequest):
            refused()
    assert handle.requests == []
