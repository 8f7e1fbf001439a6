"""Forms with files, as OpenAI's clients send them for an edit: ``multipart/form-data``."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request as HTTPRequest

from blaze.api.endpoint import body_chunks
from blaze.api.image_schemas import ImageEditRequest
from blaze.api.schemas import parse_fields
from blaze.errors import InvalidRequest

_MAX_FILES = 20  # more than can be right, so that the refusal says what is wrong
_MAX_FIELDS = 100
_ADAPTER = re.compile(r"adapters\[(.*)\]")
_IMAGE = ("image", "image[]")  # a client that has a list sends the second name for each


@dataclass(frozen=True, slots=True)
class EditForm:
    body: ImageEditRequest
    image: bytes
    mask: bytes | None


async def read_edit_form(http: HTTPRequest, max_bytes: int) -> EditForm:
    """Raises :class:`InvalidRequest` naming the wrong part, and :class:`PayloadTooLarge` while reading."""
    form = await _read(http, max_bytes)
    try:
        return _edit_form(form)
    finally:
        await form.close()


async def _read(http: HTTPRequest, max_bytes: int) -> FormData:
    content_type = http.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise InvalidRequest("The body must be a form: multipart/form-data.")

    async def chunks() -> AsyncGenerator[bytes]:
        async for chunk in body_chunks(http, max_bytes):
            yield chunk
        if not parser.is_whole:  # here, and the parser closes the files that it has begun
            raise InvalidRequest("The form is cut off: its last boundary is missing.")

    parser = _WholeForm(
        http.headers,
        chunks(),
        max_files=_MAX_FILES,
        max_fields=_MAX_FIELDS,
        max_part_size=max_bytes,  # a part that is too long is refused by its name, by the schema
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(f"The form is not valid: {error.message}") from None
    except UnicodeError:
        raise InvalidRequest("The form is not valid: its texts are not of its charset.") from None


class _WholeForm(MultiPartParser):
    """Files stay in memory, like any other body; and whether the end has come is known."""

    spool_max_size = 0  # of a temporary file: no limit, never on a disk

    is_whole = False

    def on_end(self) -> None:
        self.is_whole = True


def _edit_form(form: FormData) -> EditForm:
    fields: dict[str, object] = {}
    scales: dict[str, object] = {}
    files: dict[str, list[UploadFile]] = {"image": [], "mask": []}
    for name, value in form.multi_items():
        adapter = _ADAPTER.fullmatch(name)
        if isinstance(value, UploadFile):
            _kept(files, name).append(value)
        elif name in (*_IMAGE, "mask"):
            param = name.removesuffix("[]")
            raise InvalidRequest(f"{param}: must be a file.", param=param)
        elif adapter is not None:  # how clients write an object into a form
            scales[adapter[1]] = _as_json(value)
        else:
            fields[name] = _as_json(value) if name in ImageEditRequest.JSON_FIELDS else value
    if scales:
        fields["adapters"] = scales
    body = parse_fields(ImageEditRequest, fields)
    image = _only(files["image"], "image")
    if image is None:
        raise InvalidRequest("image: is missing.", param="image")
    return EditForm(body, image, _only(files["mask"], "mask"))


def _kept(files: dict[str, list[UploadFile]], name: str) -> list[UploadFile]:
    kept = files.get("image" if name in _IMAGE else name)
    if kept is None:
        param = name if name.isidentifier() and len(name) <= 64 else None
        raise InvalidRequest(f"{param or 'A file'}: the files of an edit are image and mask.", param=param)
    return kept


def _only(uploads: Iterable[UploadFile], param: str) -> bytes | None:
    contents = [upload.file.read() for upload in uploads]
    if len(contents) > 1:
        raise InvalidRequest(
            f"{param}: one file is supported by this version, not {len(contents)}.", param=param
        )
    if not contents:
        return None
    if not contents[0]:
        raise InvalidRequest(f"{param}: the file is empty.", param=param)
    return contents[0]


def _as_json(text: str) -> object:
    """What is no JSON stays the text that it is, and is refused by its field's type."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value
