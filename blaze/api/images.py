"""From OpenAI's image bodies to ``blaze.types``, and from events to OpenAI's image objects and streams."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from blaze.api.image_schemas import ImageBody
from blaze.api.translate import Answer, error_object
from blaze.errors import InvalidRequest
from blaze.types import (
    Caller,
    Event,
    Failed,
    Finished,
    ImageReady,
    ImageRequest,
    PartialImage,
    Progress,
    Usage,
)

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)


def image_request(
    body: ImageBody, request_id: str, caller: Caller, *, image: bytes | None, mask: bytes | None
) -> ImageRequest:
    width, height = _size(body.size)
    return ImageRequest(
        request_id=request_id,
        model=body.model,
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        n=body.n or 1,
        width=width,
        height=height,
        num_inference_steps=body.num_inference_steps,
        guidance_scale=body.guidance_scale,
        seed=body.seed,
        output_format=body.output_format or "png",
        output_compression=body.output_compression,
        image=image,
        mask=mask,
        strength=body.strength,
        scheduler=body.scheduler,
        eta=body.eta,
        clip_skip=body.clip_skip,
        adapters=tuple((body.adapters or {}).items()),
        partial_images=body.partial_images or 0,
        progress=bool(body.progress),
        caller=caller,
    )


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size is None or size == "auto":
        return None, None
    match = _SIZE.fullmatch(size)
    if match is None or int(match[1]) < 1 or int(match[2]) < 1:
        raise InvalidRequest("size: expected WIDTHxHEIGHT in pixels, or auto.", param="size")
    return int(match[1]), int(match[2])


def images_object(answer: Answer, created: int) -> dict[str, Any]:
    """OpenAI's images object; ``seed`` draws the image again."""
    ordered = sorted(answer.images, key=lambda image: image.index)
    return {
        "created": created,
        "data": [{"b64_json": _base64(image.data), "seed": image.seed} for image in ordered],
        "output_format": ordered[0].format if ordered else None,
        "size": f"{ordered[0].width}x{ordered[0].height}" if ordered else None,
        "background": "opaque",
        "usage": _usage_object(answer.usage),
    }


def _usage_object(usage: Usage) -> dict[str, Any]:
    """In OpenAI's shape. Tokens are 0 where the engine does not count them; ``images`` is ours."""
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "input_tokens_details": {"text_tokens": usage.prompt_tokens, "image_tokens": 0},
        "images": usage.images,
    }


class ImageEventWriter:
    """Writes a stream of images in OpenAI's framing: each event is a line ``event: `` with its type, a line
    ``data: `` of JSON, and a blank line. There is no ``[DONE]``: the last image, or an error, ends it.

    What the request used is known at its end, so the last image waits for that.
    """

    def __init__(
        self,
        kind: Literal["image_generation", "image_edit"],
        num_images: int,
        *,
        progress: bool,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._kind = kind
        self._num_left = num_images
        self._progress = progress
        self._now = now
        self._last: ImageReady | None = None

    def write(self, event: Event) -> str:
        """The event as it goes over the wire; empty for what an image stream does not show."""
        if isinstance(event, PartialImage):
            return self._image(f"{self._kind}.partial_image", event, {"partial_image_index": event.number})
        if isinstance(event, ImageReady):
            return self._ready(event)
        if isinstance(event, Finished):
            return self._held(event.usage)
        if isinstance(event, Failed):
            return self._held(Usage()) + _event("error", json.dumps(error_object(event.error)))
        return self._step(event) if isinstance(event, Progress) and self._progress else ""

    def _step(self, event: Progress) -> str:
        step = {"type": "blaze.progress", "step": event.step, "total": event.total}
        return _event("blaze.progress", json.dumps(step))

    def _ready(self, event: ImageReady) -> str:
        self._num_left -= 1
        if self._num_left > 0:
            return self._completed(event, Usage(images=1))
        self._last = event
        return ""

    def _held(self, usage: Usage) -> str:
        """The last image, if it came, with all that the request used but the images of the other events."""
        return "" if self._last is None else self._completed(self._last, replace(usage, images=1))

    def _completed(self, image: ImageReady, usage: Usage) -> str:
        return self._image(
            f"{self._kind}.completed", image, {"seed": image.seed, "usage": _usage_object(usage)}
        )

    def _image(self, kind: str, image: ImageReady | PartialImage, more: dict[str, Any]) -> str:
        fields = {
            "type": kind,
            "index": image.index,
            "created_at": int(self._now()),
            "size": f"{image.width}x{image.height}",
            "quality": "auto",
            "background": "opaque",
            "output_format": image.format,
            **more,
        }
        # The picture by itself: JSON's own encoder would look at each of its characters.
        return _event(kind, f'{json.dumps(fields)[:-1]}, "b64_json": "{_base64(image.data)}"}}')


def _event(kind: str, data: str) -> str:
    return f"event: {kind}\ndata: {data}\n\n"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
