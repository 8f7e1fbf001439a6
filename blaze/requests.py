"""Requests from what a caller in Python gives: a prompt in one of several shapes, and parameters by name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeAlias, get_args

from blaze.checks import check, is_number
from blaze.errors import InvalidRequest
from blaze.sampling_params import SamplingParams
from blaze.types import (
    ChatMessage,
    ChatPrompt,
    GenerateRequest,
    ImageFormat,
    ImageRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
)

PromptLike: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[int] | Prompt

_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_FLAGS = ("ignore_eos", "echo")
_IMAGE = tuple(
    field.name
    for field in fields(ImageRequest)
    if field.name not in ("request_id", "model", "prompt", "caller")
)
_ROLES = ("system", "developer", "user", "assistant", "tool")


def text_request(
    request_id: str, model: str, prompt: object, params: Mapping[str, object], *, param: str = "prompt"
) -> GenerateRequest:
    """``params``: fields of :class:`SamplingParams`, ``timeout_s`` and ``priority``.

    Lists may stand for tuples, one text for a list of stop strings, and a mapping for ``logit_bias``.
    Raises :class:`InvalidRequest` naming the parameter; ``param`` is what the prompt is called.
    """
    _refuse_unknown(params, (*_SAMPLING, "timeout_s", "priority"))
    sampling: dict[str, Any] = {name: _sampled(name, params[name]) for name in _SAMPLING if name in params}
    envelope: dict[str, Any] = {name: params[name] for name in ("timeout_s", "priority") if name in params}
    _check_timeout(params)
    return GenerateRequest(
        request_id, model, to_prompt(prompt, param=param), SamplingParams(**sampling), **envelope
    )


def image_request(
    request_id: str, model: str, prompt: object, params: Mapping[str, object], *, param: str = "prompt"
) -> ImageRequest:
    """``params``: fields of :class:`ImageRequest` but for its first three and the caller.

    ``image`` and ``mask``: the bytes of a file. ``adapters`` may be a mapping of names to scales.
    Raises :class:`InvalidRequest` naming the parameter; ``param`` is what the prompt is called.
    """
    _refuse_unknown(params, _IMAGE)
    if not isinstance(prompt, str):
        raise InvalidRequest(f"{param}: must be text.", param=param)
    for name in ("negative_prompt", "scheduler"):
        text = params.get(name)
        check(text is None or isinstance(text, str), name, "must be text")
    formats: tuple[str, ...] = get_args(ImageFormat)
    chosen = params.get("output_format", formats[0])
    check(chosen in formats, "output_format", f"must be one of {', '.join(formats)}")
    compressed = chosen != "png" or params.get("output_compression") in (None, 100)
    check(compressed, "output_compression", "only for the formats jpeg and webp")
    check(isinstance(params.get("progress", False), bool), "progress", "must be true or false")
    _check_timeout(params)
    given: dict[str, Any] = dict(params)
    for name in ("image", "mask"):
        if given.get(name) is not None:
            given[name] = _file(name, given[name])
    if "adapters" in given:
        given["adapters"] = _pairs("adapters", given["adapters"] or (), "name and scale")
    return ImageRequest(request_id, model, prompt, **given)


def to_prompt(prompt: object, *, param: str = "prompt") -> Prompt:
    """A text becomes one user message. Raises :class:`InvalidRequest` for what is no :data:`PromptLike`."""
    if isinstance(prompt, ChatPrompt | TextPrompt | TokenPrompt):
        return prompt
    if isinstance(prompt, str):
        return ChatPrompt((ChatMessage("user", prompt),))
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray) or not prompt:
        raise InvalidRequest(f"{param}: must be text, token ids or messages.", param=param)
    if all(type(token) is int for token in prompt):
        return TokenPrompt(tuple(prompt))
    return ChatPrompt(tuple(_message(message, param) for message in prompt))


def _message(message: object, param: str) -> ChatMessage:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise InvalidRequest(f"{param}: a message is a mapping with role and content.", param=param)
    role, content, calls = message["role"], message["content"], message.get("tool_calls")
    if role not in _ROLES:
        raise InvalidRequest(f"{param}: a role is one of {', '.join(_ROLES)}.", param=param)
    if content is not None and not isinstance(content, str):
        raise InvalidRequest(f"{param}: the content of a message is text.", param=param)
    try:
        tool_calls = json.dumps(calls) if calls else None
    except TypeError:
        raise InvalidRequest(f"{param}: tool_calls must be JSON.", param=param) from None
    return ChatMessage(
        role=role,
        content=content,
        name=message.get("name"),
        tool_calls=tool_calls,
        tool_call_id=message.get("tool_call_id"),
    )


def _refuse_unknown(params: Mapping[str, object], known: Collection[str]) -> None:
    for name in params:
        if name not in known:
            raise InvalidRequest(
                f"{name}: there is no such parameter (there are {', '.join(known)}).", param=name
            )


def _check_timeout(params: Mapping[str, object]) -> None:
    seconds = params.get("timeout_s")
    if seconds is not None:
        good = isinstance(seconds, int | float) and is_number(seconds) and seconds >= 0
        check(good, "timeout_s", "must be a number of seconds, at least 0")


def _sampled(name: str, value: object) -> object:
    """The value as the field takes it; what it may be beyond its shape, the field checks itself."""
    if name in _FLAGS:
        check(isinstance(value, bool), name, "must be true or false")
    elif name == "stop" and isinstance(value, str):
        return (value,)
    elif name in ("stop", "stop_token_ids"):
        return _as_tuple(name, value)
    elif name == "logit_bias":
        return _pairs(name, value, "token id and bias")
    return value


def _as_tuple(name: str, value: object) -> tuple[object, ...]:
    if not isinstance(value, list | tuple):
        raise InvalidRequest(f"{name}: must be a list.", param=name)
    return tuple(value)


def _pairs(name: str, value: object, of_what: str) -> tuple[tuple[object, ...], ...]:
    pairs = value.items() if isinstance(value, Mapping) else _as_tuple(name, value)
    made = tuple(_as_tuple(name, pair) for pair in pairs)
    check(all(len(pair) == 2 for pair in made), name, f"must be pairs of {of_what}")
    return made


def _file(name: str, value: object) -> bytes:
    if not isinstance(value, bytes | bytearray) or not value:
        raise InvalidRequest(f"{name}: must be the bytes of an image file.", param=name)
    return bytes(value)
