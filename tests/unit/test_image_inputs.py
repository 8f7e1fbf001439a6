"""Images and masks as they come from clients."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from typing import Any

import pytest
from PIL import ExifTags, Image, ImageCms

from blaze.engines.diffusion import inputs
from blaze.engines.diffusion.inputs import OWN_MASK_PIXELS, own_mask, read_image, read_mask
from blaze.errors import InvalidRequest
from tests.image_files import encoded, picture, raw_png, with_hole

MAX_PIXELS = 64 * 64
FOUR = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]  # a b / c d


def read(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    return read_image(data, max_pixels=max_pixels)


def mask_of(data: bytes, size: tuple[int, int] = (2, 2)) -> list[int]:
    mask = read_mask(data, size=size, max_pixels=MAX_PIXELS)
    assert mask.mode == "L"
    return list(mask.tobytes())


def pixels(image: Image.Image) -> list[Any]:
    return list(image.get_flattened_data())


def of(mode: str, values: list[Any], size: tuple[int, int] = (2, 2)) -> Image.Image:
    image = Image.new(mode, size)
    image.putdata(values)
    return image


def refusal(data: bytes, max_pixels: int = MAX_PIXELS) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        read(data, max_pixels)
    assert refused.value.param == "image"
    return refused.value


# --- What is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100, "subsampling": 0})],
)
def test_the_formats_of_openais_edits_are_read(image_format: str, options: dict[str, Any]) -> None:
    image = read(encoded(Image.new("RGB", (24, 16), (200, 30, 60)), image_format, **options))
    assert (image.mode, image.size) == ("RGB", (24, 16))
    assert max(abs(a - b) for a, b in zip(image.getpixel((3, 3)), (200, 30, 60), strict=True)) <= 2  # type: ignore[arg-type]


def test_transparency_is_laid_on_white() -> None:
    drawn = of("RGBA", [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128), (0, 0, 255, 255)])
    assert pixels(read(encoded(drawn))) == [(255, 0, 0), (255, 255, 255), (127, 127, 127), (0, 0, 255)]
    grey = of("LA", [(0, 255), (0, 0), (90, 255), (255, 0)])
    assert pixels(read(encoded(grey))) == [(0,) * 3, (255,) * 3, (90,) * 3, (255,) * 3]


def test_palettes_are_looked_up_and_their_transparent_entries_are_white() -> None:
    image = of("P", [0, 1, 2, 1])
    image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 255])
    assert pixels(read(encoded(image))) == [(10, 20, 30), (200, 100, 0), (0, 0, 255), (200, 100, 0)]
    assert pixels(read(encoded(image, transparency=1)))[1] == (255, 255, 255)


def test_grey_and_black_and_white_become_rgb() -> None:
    assert pixels(read(encoded(of("L", [0, 9, 128, 255]))))[1:3] == [(9, 9, 9), (128, 128, 128)]
    assert pixels(read(encoded(of("1", [0, 255, 255, 0])))) == [(0,) * 3, (255,) * 3, (255,) * 3, (0,) * 3]


def test_sixteen_bits_of_grey_are_scaled_not_cut_off() -> None:
    rows = b"".join(b"\0" + struct.pack(">2H", *pair) for pair in ((0, 65535), (32768, 300)))
    image = read(raw_png(2, 2, depth=16, colour_type=0, rows=rows))
    assert [pixel[0] for pixel in pixels(image)] == [0, 255, 128, 1]
    see_through = raw_png(2, 2, depth=16, colour_type=0, rows=rows, transparency=struct.pack(">H", 300))
    assert [pixel[0] for pixel in pixels(read(see_through))] == [0, 255, 128, 255]
    assert own_mask(see_through) == see_through


def test_sixteen_bits_of_colour_are_scaled() -> None:
    rows = b"\0" + struct.pack(">6H", 65535, 0, 32768, 257, 65535, 0)
    assert pixels(read(raw_png(2, 1, depth=16, colour_type=2, rows=rows))) == [(255, 0, 128), (1, 255, 0)]


def test_cmyk_becomes_rgb() -> None:
    red = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    seen = read(red).getpixel((4, 4))
    assert isinstance(seen, tuple)
    assert seen[0] > 250
    assert max(seen[1:]) < 5


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, "abcd"),
        (2, "badc"),
        (3, "dcba"),
        (4, "cdab"),
        (5, "acbd"),
        (6, "cadb"),
        (7, "dbca"),
        (8, "bdac"),
    ],
)
@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_a_picture_that_lies_on_its_side_is_turned(orientation: int, upright: str, image_format: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(of("RGB", FOUR), image_format, exif=exif, lossless=True)
    assert "".join("abcd"[FOUR.index(pixel)] for pixel in pixels(read(data))) == upright


def test_a_photograph_that_lies_on_its_side_has_its_sides_swapped_and_its_mask_must_too() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = read(encoded(Image.new("RGB", (40, 24)), "JPEG", exif=exif))
    assert image.size == (24, 40)
    assert read_mask(with_hole(24, 40), size=image.size, max_pixels=MAX_PIXELS).size == (24, 40)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_notes_about_a_picture_do_not_spoil_it(exif: bytes) -> None:
    assert read(encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=exif)).size == (8, 8)


def test_a_colour_profile_is_not_applied() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert pixels(read(encoded(of("RGB", FOUR), icc_profile=profile))) == FOUR


# --- What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"\0" * 999]
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    refusal(data)


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused_even_where_pillow_knows_them(image_format: str) -> None:
    assert "PNG, JPEG or WebP" in refusal(encoded(Image.new("RGB", (16, 16)), image_format)).message


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_an_animation_is_refused_and_not_answered_with_its_first_frame(image_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], duration=50)
    assert "animation" in refusal(data).message


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_was_cut_off_is_refused(image_format: str) -> None:
    rng = random.Random(5)
    noise = Image.frombytes("RGB", (48, 48), rng.randbytes(48 * 48 * 3))
    whole = encoded(noise, image_format)
    assert read(whole).size == (48, 48)
    for share in (0.01, 0.2, 0.5, 0.9):
        refusal(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_a_file_with_wrong_bytes_is_read_or_refused_but_never_anything_else(image_format: str) -> None:
    rng = random.Random(7)
    whole = bytearray(encoded(Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20), image_format))
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(8, len(damaged))] = rng.randrange(256)
        for look in (read, own_mask):
            try:
                look(bytes(damaged))
            except InvalidRequest as refused:
                assert refused.param == "image"


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (65, 64)])
def test_a_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    bomb = raw_png(width, height, depth=8, colour_type=2, rows=b"\0" * 100_000)
    before, limit = time.monotonic(), Image.MAX_IMAGE_PIXELS
    tracemalloc.start()
    try:
        assert str(MAX_PIXELS) in refusal(bomb).message
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    assert time.monotonic() - before < 1
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_webp_of_any_size_is_refused_by_its_header() -> None:
    small = encoded(Image.new("RGB", (64, 64)), "WEBP", lossless=True)
    # Width and height, less one, are 14 bits each behind the signature byte of a lossless stream.
    at = small.index(b"VP8L") + 9
    bits = struct.unpack("<I", small[at : at + 4])[0] | 0x0FFFFFFF
    refusal(small[:at] + struct.pack("<I", bits) + small[at + 4 :])
    refusal(small, 64 * 64 - 1)


def test_a_picture_of_just_the_limit_is_read() -> None:
    assert read(picture(64, 64)).size == (64, 64)


def test_a_file_of_too_many_bytes_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_FILE_BYTES", 100)
    assert "100 bytes" in refusal(picture() + b"\0" * 100).message


def test_memory_that_runs_out_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", exhausted)
    with pytest.raises(MemoryError):
        read(picture())


# --- Masks -------------------------------------------------------------------------------------------


def test_a_mask_edits_where_its_alpha_is_0_and_nowhere_else() -> None:
    mask = of("RGBA", [(0, 0, 0, 0), (255, 255, 255, 1), (255, 255, 255, 255), (255, 255, 255, 0)])
    assert mask_of(encoded(mask)) == [255, 0, 0, 255]


def test_a_mask_without_alpha_edits_where_it_is_white() -> None:
    assert mask_of(encoded(of("L", [0, 127, 128, 255]))) == [0, 0, 255, 255]
    assert mask_of(encoded(of("1", [0, 255, 0, 0]))) == [0, 255, 0, 0]
    assert mask_of(encoded(of("RGB", [(255,) * 3, (0,) * 3, (250,) * 3, (9,) * 3]))) == [255, 0, 255, 0]
    rows = b"".join(b"\0" + struct.pack(">2H", *pair) for pair in ((0, 65535), (300, 40000)))
    assert mask_of(raw_png(2, 2, depth=16, colour_type=0, rows=rows)) == [0, 255, 0, 255]
    cmyk = encoded(Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "JPEG")
    assert mask_of(cmyk) == [255] * 4


def test_a_mask_is_turned_as_its_image_is() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    assert mask_of(encoded(of("L", [255, 0, 0, 0]), exif=exif)) == [0, 0, 0, 255]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (picture(2, 2, (0, 0, 0, 255), "RGBA"), "transparent"),
        (picture(2, 2, (255, 255, 255, 255), "RGBA"), "transparent"),
        (picture(2, 2, (255, 255, 255, 1), "RGBA"), "transparent"),
        (picture(2, 2, "black"), "white"),
        (picture(2, 2, 127, "L"), "white"),
        (picture(3, 2, "white"), "3x2"),
        (picture(65, 64, "white"), str(MAX_PIXELS)),
        (b"hello", "PNG"),
        (b"", "PNG"),
        (picture(2, 2)[:40], "damaged"),
    ],
)
def test_a_mask_that_cannot_be_is_refused_by_name(data: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        mask_of(data)
    assert refused.value.param == "mask"
    assert says in refused.value.message


# --- Images that are their own masks -----------------------------------------------------------------


def test_an_image_with_a_hole_is_its_own_mask() -> None:
    hole = with_hole()
    assert own_mask(hole) is hole  # one object: it is sent once
    mask = read_mask(hole, size=(16, 16), max_pixels=MAX_PIXELS)
    assert mask.getbbox() == (0, 0, 8, 16)


@pytest.mark.parametrize(
    "data",
    [
        picture(),
        picture(colour=(1, 2, 3, 255), mode="RGBA"),
        picture(colour=(1, 2, 3, 1), mode="RGBA"),
        encoded(Image.new("RGB", (16, 16)), "JPEG"),
    ],
)
def test_an_image_without_a_hole_has_no_mask(data: bytes) -> None:
    assert own_mask(data) is None


def test_only_a_picture_that_may_have_a_hole_is_decoded_and_only_up_to_a_size() -> None:
    rows = b"\0" * 1000
    side = int(OWN_MASK_PIXELS**0.5) + 1
    assert own_mask(raw_png(side, side, depth=8, colour_type=2, rows=rows)) is None
    with pytest.raises(InvalidRequest) as refused:
        own_mask(raw_png(side, side, depth=8, colour_type=6, rows=rows))
    assert refused.value.param == "image"


@pytest.mark.parametrize("data", [b"", b"hello", with_hole()[:60]])
def test_what_is_no_picture_is_no_mask_either(data: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        own_mask(data)
    assert refused.value.param == "image"
