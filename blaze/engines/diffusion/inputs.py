"""Images and masks that requests bring: checked by their headers, then decoded into what pipelines take."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from blaze.errors import InvalidRequest

MAX_FILE_BYTES = 50 * 2**20  # OpenAI's limit of a file
OWN_MASK_PIXELS = 4096 * 4096  # decoded only to look at its transparency: 64 MiB

_Opened = PngImageFile | JpegImageFile | WebPImageFile

_UPRIGHT = {  # Exif's orientation -> how the picture is turned back
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """The picture in mode RGB, turned upright.

    What is transparent is laid on white; 16-bit grey is scaled to 8 bits; CMYK, grey and palettes are
    converted; colour profiles are not applied. Raises :class:`InvalidRequest` naming ``image`` for whatever
    is not one whole PNG, JPEG or WebP picture of at most ``max_pixels``, by its header where that says so.
    """
    with _refusing("image"):
        image = _upright(_open(data, "image", max_pixels))
        if not image.has_transparency_data:
            return image.convert("RGB")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def read_mask(data: bytes, *, size: tuple[int, int], max_pixels: int) -> Image.Image:
    """What to edit, in mode L: 255 where a pixel is drawn anew, else 0.

    With transparency, that is where alpha is 0 (OpenAI's rule); without, where the mask is nearer to white
    than to black (diffusers'). ``size``: (width, height) of the image that it belongs to. Raises
    :class:`InvalidRequest` naming ``mask`` as :func:`read_image` does, for another size, and for a mask that
    leaves nothing to edit.
    """
    with _refusing("mask"):
        mask = _upright(_open(data, "mask", max_pixels))
        if mask.size != size:
            (width, height), (wanted_width, wanted_height) = mask.size, size
            raise InvalidRequest(
                f"mask: has {width}x{height} pixels, and the image {wanted_width}x{wanted_height}.",
                param="mask",
            )
        transparent = mask.has_transparency_data
        edited = _transparent(mask) if transparent else mask.convert("L").point(lambda v: 255 * (v > 127))
        if edited.getbbox() is None:
            marked = "transparent" if transparent else "white"
            raise InvalidRequest(f"mask: nothing to edit: no pixel is fully {marked}.", param="mask")
        return edited


def own_mask(image: bytes) -> bytes | None:
    """The image itself where a part of it is fully transparent: an edit without a mask edits that part.

    None: it has no such part. Raises :class:`InvalidRequest` naming ``image``. Blocking: it may decode.
    """
    with _refusing("image"):
        opened = _open(image, "image", None)
        if not opened.has_transparency_data:
            return None
        _check_pixels(opened, "image", OWN_MASK_PIXELS)
        return None if _transparent(_eight_bits(opened)).getbbox() is None else image


def _open(data: bytes, param: str, max_pixels: int | None) -> _Opened:
    """Reads the header and no pixel.

    Not ``Image.open``: its own limit on pixels is a setting of the whole process, and it would try every
    format that Pillow knows.
    """
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequest(f"{param}: the file may have {MAX_FILE_BYTES} bytes.", param=param)
    file = io.BytesIO(data)
    opened: _Opened
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        opened = PngImageFile(file)
    elif data.startswith(b"\xff\xd8\xff"):
        opened = JpegImageFile(file)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        opened = WebPImageFile(file)
    else:
        raise InvalidRequest(f"{param}: must be a PNG, JPEG or WebP file.", param=param)
    if max_pixels is not None:
        _check_pixels(opened, param, max_pixels)
    frames = 1 if isinstance(opened, JpegImageFile) else opened.n_frames
    if frames > 1:
        # Its first frame alone would be an answer to something that nobody asked.
        raise InvalidRequest(f"{param}: is an animation, and must be one picture.", param=param)
    return opened


def _check_pixels(opened: _Opened, param: str, max_pixels: int) -> None:
    if opened.width * opened.height > max_pixels:
        raise InvalidRequest(
            f"{param}: has {opened.width}x{opened.height} pixels; at most {max_pixels} are allowed.",
            param=param,
        )


def _upright(opened: _Opened) -> Image.Image:
    image = _eight_bits(opened)
    try:
        orientation = opened.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a picture whose notes are damaged is a picture still
        orientation = None
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _eight_bits(opened: _Opened) -> Image.Image:
    """Decoded; 16 bits of grey scaled down, which Pillow's own conversion would cut off at 255."""
    opened.load()
    if not opened.mode.startswith("I"):
        return opened
    levels = np.asarray(opened)
    grey = Image.fromarray((levels / 257).round().astype(np.uint8))
    key = opened.info.get("transparency")  # the level that stands for "transparent"
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8)))
    return grey


def _transparent(image: Image.Image) -> Image.Image:
    """255 where a pixel is fully transparent, else 0."""
    return image.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha == 0))


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    try:
        yield
    except (InvalidRequest, MemoryError):
        raise
    except Image.DecompressionBombError:  # WebP's canvas is there before its size can be asked for
        raise InvalidRequest(f"{param}: has too many pixels.", param=param) from None
    except Exception as error:  # decoders raise anything at bytes that a stranger has chosen
        raise InvalidRequest(f"{param}: the file is damaged or cut off.", param=param) from error
