"""Operations by name: what each kind of engine is asked for, as requests and whole results."""

from __future__ import annotations

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import ClassVar

from blaze.errors import BlazeError, ErrorInfo, InvalidRequest, UnsupportedOperation
from blaze.requests import image_request, text_request
from blaze.results import Answer, Batch, Result, whole
from blaze.types import EngineKind, Events, Request

_AT_ONCE = 64  # requests of a batch: more than an engine works on, so that it never waits for the next

_BATCHES = ("batch_generate", "generate_batch")
_TEXT = ("generate", "batch_generate")
_OFFERED: dict[EngineKind, tuple[str, ...]] = {
    EngineKind.LLM: _TEXT,
    EngineKind.SIMULATOR: _TEXT,
    EngineKind.DIFFUSION: ("generate", "generate_batch", "img2img", "inpaint"),
}
_NEEDED = {"img2img": ("image",), "inpaint": ("image", "mask")}
_LATER = "is not available in this version"
_NO_TEXT = {
    "generate_stream": "has no whole result; read the events of a stream from `run`",
    "embed": _LATER,
}
_REFUSED: dict[EngineKind, dict[str, str]] = {
    EngineKind.LLM: _NO_TEXT,
    EngineKind.SIMULATOR: _NO_TEXT,
    EngineKind.DIFFUSION: {"upscale": _LATER},
}


@dataclass(frozen=True, slots=True)
class Call:
    """What an operation comes to. ``is_batch``: a :class:`Batch` is asked for, even of one request."""

    requests: tuple[Request, ...]
    is_batch: bool


def translate(kind: EngineKind, operation: str, params: Mapping[str, object], *, model: str) -> Call:
    """``params``: ``prompt``, or ``prompts`` of a batch, and what :mod:`blaze.requests` takes beside it.

    Raises :class:`InvalidRequest` naming the parameter (``operation`` for one that there is not), and
    :class:`UnsupportedOperation` for an operation that is known and not offered.
    """
    if operation in _REFUSED[kind]:
        raise UnsupportedOperation(f"operation: {operation} {_REFUSED[kind][operation]}.", param="operation")
    if operation not in _OFFERED[kind]:
        known = ", ".join(_OFFERED[kind])
        raise InvalidRequest(f"operation: {operation!r} is not one of {known}.", param="operation")
    make = image_request if kind is EngineKind.DIFFUSION else text_request
    is_batch = operation in _BATCHES
    name = "prompts" if is_batch else "prompt"
    for needed in (name, *_NEEDED.get(operation, ())):
        if params.get(needed) is None:
            raise InvalidRequest(f"{needed}: is missing.", param=needed)
    shared = {key: value for key, value in params.items() if key != name}
    if not is_batch:
        return Call((make(_new_id(), model, params[name], shared),), is_batch=False)
    prompts = params[name]
    if not isinstance(prompts, list | tuple) or not prompts:
        raise InvalidRequest("prompts: must be a list of at least one prompt.", param="prompts")
    return Call(
        tuple(
            make(_new_id(), model, prompt, shared, param=f"prompts[{index}]")
            for index, prompt in enumerate(prompts)
        ),
        is_batch=True,
    )


async def answer_all(
    requests: Sequence[Request],
    answer: Callable[[Request], Awaitable[Answer]],
    *,
    at_once: asyncio.Semaphore,
) -> Batch:
    """All of them, each whatever becomes of the others."""

    async def answer_one(request: Request) -> Answer | ErrorInfo:
        async with at_once:
            try:
                return await answer(request)
            except BlazeError as error:
                return error.info

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(answer_one(request)) for request in requests]
    return Batch(tuple(task.result() for task in tasks))


class RunsOperations(ABC):
    """Gives an engine ``execute``, in terms of its ``run``."""

    kind: ClassVar[EngineKind]

    @abstractmethod
    def run(self, request: Request) -> AsyncGenerator[Events]: ...

    @property
    def operations(self) -> tuple[str, ...]:
        return _OFFERED[self.kind]

    async def execute(self, operation: str, params: Mapping[str, object]) -> Result:
        call = translate(self.kind, operation, params, model=self.kind.value)
        if call.is_batch:
            return await answer_all(call.requests, self._whole_answer, at_once=asyncio.Semaphore(_AT_ONCE))
        return await self._whole_answer(call.requests[0])

    async def _whole_answer(self, request: Request) -> Answer:
        async with aclosing(self.run(request)) as batches:
            return await whole(request, batches)


def _new_id() -> str:
    return f"local-{uuid.uuid4().hex}"
