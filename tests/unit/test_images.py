from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blaze.engines.diffusion.images import encode, to_image, to_pixels
from blaze.errors import NonFiniteOutput


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_case_41_one_pixel_that_is_no_number_is_enough(bad: float) -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.float32)
    pixels[2, 1, 0] = bad
    with pytest.raises(NonFiniteOutput):
        to_image(pixels)


def test_pixels_are_rounded_and_clipped_to_8_bits() -> None:
    row = np.array([[[-0.5], [0.0], [0.499 / 255], [0.501 / 255], [1.0], [1.5]]], dtype=np.float32)
    assert list(np.asarray(to_image(row))[0]) == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_images_are_encoded_in_the_asked_format(image_format: Any) -> None:
    data = encode(to_image(np.zeros((8, 16, 3), dtype=np.float32)), image_format)
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == (image_format.upper(), (16, 8))


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_compression_is_the_quality_of_formats_that_lose_something(image_format: Any) -> None:
    noise = to_image(np.random.default_rng(0).random((64, 64, 3), dtype=np.float32))
    sizes = [len(encode(noise, image_format, quality)) for quality in (0, 50, 100)]
    assert sizes == sorted(set(sizes))


def test_png_loses_nothing_whatever_the_compression() -> None:
    noise = to_image(np.random.default_rng(0).random((16, 16, 3), dtype=np.float32))
    assert encode(noise, "png", 0) == encode(noise, "png")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(noise, "png", 0)))), np.asarray(noise))


def test_finished_images_of_a_pipeline_become_pixels() -> None:
    levels = np.array([[[0, 51, 255]]], dtype=np.uint8)
    assert to_pixels(Image.fromarray(levels)).tolist() == [[[0.0, pytest.approx(0.2), 1.0]]]
    pixels = np.array([[[0.25]]], dtype=np.float32)
    assert to_pixels(pixels).tolist() == [[[0.25]]]
