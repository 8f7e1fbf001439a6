"""From the model's pixels to encoded images."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from blaze.errors import NonFiniteOutput
from blaze.types import ImageFormat

Pixels = npt.NDArray[np.float32]


def to_pixels(image: Pixels | Image.Image) -> Pixels:
    """What a pipeline gives, as numbers in 0..1: some classes give finished images, whatever is asked."""
    pixels = np.asarray(image)
    scale = 255 if pixels.dtype == np.uint8 else 1
    return pixels.astype(np.float32, copy=False) / np.float32(scale)


def to_image(pixels: Pixels) -> Image.Image:
    """``pixels``: [height, width, channels] in 0..1, one or three channels.

    Raises :class:`NonFiniteOutput` for NaN and infinity, which a cast would turn into black.
    """
    if not np.isfinite(pixels).all():
        raise NonFiniteOutput("The model produced NaN or infinite pixels.")
    levels = (pixels * 255).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels)


def encode(image: Image.Image, image_format: ImageFormat, compression: int | None = None) -> bytes:
    """``compression``: the quality of JPEG and WebP, 0 to 100; PNG loses nothing whatever it is."""
    buffer = io.BytesIO()
    if compression is None or image_format == "png":
        image.save(buffer, format=image_format.upper())
    else:
        image.save(buffer, format=image_format.upper(), quality=compression)
    return buffer.getvalue()
