"""The bodies of OpenAI's image endpoints, with diffusers' parameters beside OpenAI's."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from blaze.api.schemas import Body, Count, Number, Seed
from blaze.checks import is_number
from blaze.types import MAX_PARTIAL_IMAGES

MAX_IMAGES = 16
MAX_ADAPTERS = 16

_DATA_URL = re.compile(r"data:[^,]{0,100};base64,", re.IGNORECASE)


def _decoded(value: object) -> object:
    """Bytes from base64, with or without a data URL's head; never fetched from anywhere."""
    if not isinstance(value, str):
        return value
    head = _DATA_URL.match(value)
    if head is None and ":" in value[:16]:
        raise ValueError("must be base64 or a data URL of base64; other addresses are not fetched")
    try:
        data = base64.b64decode("".join(value[head.end() if head else 0 :].split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not valid base64") from None
    if not data:
        raise ValueError("is empty")
    return data


def _are_scales_by_name(value: object) -> object:
    """Ahead of the field's own type: an error there would name the client's key as if it were a field."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_ADAPTERS:
        raise ValueError(f"must be an object of at most {MAX_ADAPTERS} names and their scales")
    for name, scale in value.items():
        if len(name) > 128 or not is_number(scale) or not abs(scale) <= 10:
            raise ValueError("must be names with scales between -10 and 10")
    return value


EncodedImage = Annotated[bytes, BeforeValidator(_decoded)]
Adapters = Annotated[dict[str, Number] | None, BeforeValidator(_are_scales_by_name)]
Text = Annotated[str, Field(max_length=32_000)]
Fraction = Annotated[Number, Field(ge=0, le=1)]


class ImageBody(Body):
    """What generations and edits have in common."""

    UNSUPPORTED: ClassVar[dict[str, tuple[object, ...]]] = {
        "quality": ("auto", "standard"),
        "background": ("auto", "opaque"),
        "style": (),
        "input_fidelity": ("low",),
    }

    prompt: Text
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = None
    quality: str | None = None
    background: str | None = None
    style: str | None = None
    input_fidelity: str | None = None
    user: str | None = None
    # Under diffusers' names.
    num_inference_steps: Count | None = None
    guidance_scale: Annotated[Number, Field(ge=0, le=1000)] | None = None
    negative_prompt: Text | None = None
    strength: Fraction | None = None
    scheduler: Annotated[str, Field(max_length=128)] | None = None
    eta: Fraction | None = None
    clip_skip: Count | None = None
    adapters: Adapters = None
    seed: Seed | None = None
    progress: bool | None = None

    @model_validator(mode="after")
    def _only_where_it_means_something(self) -> Self:
        for name in ("partial_images", "progress"):
            if getattr(self, name) and not self.stream:
                raise ValueError(f"{name}: only allowed with stream: true")
        if self.output_compression not in (None, 100) and self.output_format not in ("jpeg", "webp"):
            raise ValueError("output_compression: only for the formats jpeg and webp")
        return self


class ImageGenerationRequest(ImageBody):
    # Ours: what to begin with, and which part of it to edit.
    image: EncodedImage | None = None
    mask: EncodedImage | None = None


class ImageEditRequest(ImageBody):
    """The text parts of a form; its files are checked where the form is read."""

    # Fields whose text in a form is read as JSON; in all others it stands for itself.
    JSON_FIELDS: ClassVar[frozenset[str]] = frozenset(
        (
            *("n", "output_compression", "stream", "partial_images", "progress", "seed", "adapters"),
            *("num_inference_steps", "guidance_scale", "strength", "eta", "clip_skip"),
        )
    )
