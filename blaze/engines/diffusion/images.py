"""From the model's pixels to encoded images."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from blaze.errors import NonFiniteOutput
from blaze.types import ImageFormat

Pixels = npt.NDArray[np.float32]


def to_image(pixels: Pixels) -> Image.Image:
    """``pixels``: [height, width, channels] in 0..1, one or three channels.

    Raises :class:`NonFiniteOutput` for NaN and infinity, which a cast would turn into black.
    """
    if not np.isfinite(pixels).all():
        raise NonFiniteOutput("The model produced NaN or infinite pixels.")
    levels = (pixels * 255).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels)


def encode(image: Image.Image, image_format: ImageFormat) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format.upper())
    return buffer.getvalue()
