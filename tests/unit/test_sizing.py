from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blaze.engines.diffusion.sizing import Inputs, drawn_size, read_inputs
from blaze.errors import InvalidRequest
from tests.samples import image_request


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def left_half(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def read(size: tuple[int, int], *, masked: bool = False, **asked: Any) -> Inputs:
    image = png(Image.new("RGB", size, "red"))
    mask = png(left_half(*size)) if masked else None
    return read_inputs(image_request(image=image, mask=mask, **asked), size_factor=8, max_pixels=4096)


@pytest.mark.parametrize(
    ("given", "drawn"),
    [
        ((32, 24), (32, 24)),
        ((33, 31), (32, 24)),
        ((8, 15), (8, 8)),
        ((64, 64), (64, 64)),  # just as large as allowed
        ((65, 64), (64, 56)),
        ((128, 128), (64, 64)),
        ((200, 100), (88, 40)),
    ],
)
def test_the_size_is_the_images_own_rounded_down_and_bounded(
    given: tuple[int, int], drawn: tuple[int, int]
) -> None:
    assert drawn_size(given, size_factor=8, max_pixels=4096) == drawn
    assert drawn[0] * drawn[1] <= 4096


@pytest.mark.parametrize("size", [(7, 64), (64, 7), (1000, 9)])
def test_an_image_too_small_or_too_narrow_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        drawn_size(size, size_factor=8, max_pixels=4096)
    assert caught.value.param == "image"


def test_image_mask_and_request_get_one_size() -> None:
    inputs = read((35, 30), masked=True)
    assert inputs.image is not None
    assert inputs.mask is not None
    assert inputs.image.size == inputs.mask.size == (32, 24)
    assert (inputs.request.width, inputs.request.height) == (32, 24)
    assert inputs.image.getpixel((0, 0)) == (255, 0, 0)


def test_a_size_that_is_asked_for_is_that_of_image_and_mask() -> None:
    inputs = read((32, 32), masked=True, width=16, height=64)
    assert inputs.image is not None
    assert inputs.mask is not None
    assert inputs.image.size == inputs.mask.size == (16, 64)
    levels = np.asarray(inputs.mask)
    assert set(np.unique(levels)) == {0, 255}, "a mask has no shades"
    assert levels[:, :8].min() == 255
    assert levels[:, 8:].max() == 0


def test_what_has_the_right_size_is_left_as_it_is() -> None:
    inputs = read((32, 24))
    assert inputs.image is not None
    assert inputs.mask is None
    assert np.array_equal(np.asarray(inputs.image), np.full((24, 32, 3), (255, 0, 0)))


def test_a_photo_larger_than_what_is_drawn_is_made_smaller() -> None:
    inputs = read((1000, 1000))
    assert inputs.image is not None
    assert inputs.image.size == (64, 64)


def test_a_request_without_an_image_is_left_alone() -> None:
    request = image_request()
    assert read_inputs(request, size_factor=8, max_pixels=64).request is request


def test_a_mask_of_another_size_is_refused() -> None:
    request = image_request(image=png(Image.new("RGB", (32, 32))), mask=png(left_half(16, 32)))
    with pytest.raises(InvalidRequest) as caught:
        read_inputs(request, size_factor=8, max_pixels=4096)
    assert caught.value.param == "mask"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"width": 64}, "size"),  # by the image's own height, 64 x 2,000 pixels
        ({"width": 8, "height": 17_000, "output_format": "webp"}, "output_format"),
    ],
)
def test_the_size_in_which_it_is_drawn_is_checked_before_the_image_is_brought_to_it(
    options: dict[str, Any], param: str
) -> None:
    request = image_request(image=png(Image.new("RGB", (16, 2_000))), **options)
    most = 100_000 if param == "size" else 200_000
    with pytest.raises(InvalidRequest) as caught:
        read_inputs(request, size_factor=8, max_pixels=most)
    assert caught.value.param == param
