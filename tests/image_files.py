"""Image files for tests, also ones that no honest program writes."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image


def encoded(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def picture(width: int = 16, height: int = 16, colour: Any = "red", mode: str = "RGB") -> bytes:
    return encoded(Image.new(mode, (width, height), colour))


def with_hole(width: int = 16, height: int = 16) -> bytes:
    """Green, and fully transparent in its left half."""
    image = Image.new("RGBA", (width, height), (0, 128, 0, 255))
    image.paste((0, 128, 0, 0), (0, 0, width // 2, height))
    return encoded(image)


def raw_png(
    width: int, height: int, *, depth: int, colour_type: int, rows: bytes, transparency: bytes = b""
) -> bytes:
    """A PNG with whatever its header claims. ``rows``: each with its filter byte, not yet compressed."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparency), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(_chunk(kind, data) for kind, data in chunks if data or kind != b"tRNS")
    return b"\x89PNG\r\n\x1a\n" + body


def padded(png: bytes, size: int) -> bytes:
    """The same picture in a file of at least so many bytes."""
    header_end = 8 + 25
    return png[:header_end] + _chunk(b"zzZz", b"\0" * size) + png[header_end:]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
