"""The size of what is drawn, and the given image and mask in that size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from PIL import Image

from blaze.engines.diffusion.inputs import OWN_MASK_PIXELS, read_image, read_mask
from blaze.errors import InvalidRequest
from blaze.types import ImageRequest

_LONGEST_SIDE = {"webp": 16_383, "jpeg": 65_500}  # pixels, of what Pillow's encoders take


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """``request`` with the width and height of ``image`` and ``mask``."""

    request: ImageRequest
    image: Image.Image | None = None
    mask: Image.Image | None = None


def read_inputs(request: ImageRequest, *, size_factor: int, max_pixels: int) -> Inputs:
    """Decode what the request brings, and bring it to the size in which it is drawn. Blocking.

    Without a size, that is the image's own, made smaller where it is above ``max_pixels`` and rounded down
    to multiples of ``size_factor``. Raises :class:`InvalidRequest` naming ``image`` or ``mask``.
    """
    if request.image is None:
        return Inputs(request)
    most = max(max_pixels, OWN_MASK_PIXELS)  # of the file: a photo may be larger than what is drawn of it
    image = read_image(request.image, max_pixels=most)
    mask = None if request.mask is None else read_mask(request.mask, size=image.size, max_pixels=most)
    own = drawn_size(image.size, size_factor=size_factor, max_pixels=max_pixels)
    size = (request.width or own[0], request.height or own[1])
    if size[0] * size[1] > max_pixels:
        raise InvalidRequest(f"size: at most {max_pixels} pixels.", param="size")
    check_format(request, size)
    return Inputs(
        request=replace(request, width=size[0], height=size[1]),
        image=image if image.size == size else image.resize(size, Image.Resampling.LANCZOS),
        mask=mask if mask is None or mask.size == size else mask.resize(size, Image.Resampling.NEAREST),
    )


def check_format(request: ImageRequest, size: tuple[int, int]) -> None:
    """Raises :class:`InvalidRequest` for a size that the format cannot hold."""
    most = _LONGEST_SIDE.get(request.output_format)
    if most is not None and max(size) > most:
        raise InvalidRequest(
            f"output_format: {request.output_format} has at most {most} pixels a side.", param="output_format"
        )


def drawn_size(size: tuple[int, int], *, size_factor: int, max_pixels: int) -> tuple[int, int]:
    """The size in which an image of this size is drawn, (width, height) both.

    Raises :class:`InvalidRequest` for one too small, or too narrow.
    """
    shrink = min(1.0, math.sqrt(max_pixels / (size[0] * size[1])))
    width, height = (int(side * shrink) // size_factor * size_factor for side in size)
    if not width or not height:
        raise InvalidRequest(
            f"image: {size[0]}x{size[1]} pixels; each side needs {size_factor} at least.", param="image"
        )
    return width, height
