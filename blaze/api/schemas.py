"""The bodies of OpenAI's API: everything about a request that needs no model is validated here.

``null`` means the same as leaving a field out. Unknown fields are ignored, as OpenAI does. Types are
strict: ``"5"`` and ``true`` are not integers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from blaze.api.messages import Message, Tool
from blaze.checks import SEED_BOUND
from blaze.config_errors import field_path
from blaze.errors import InvalidRequest
from blaze.sampling_params import MAX_LOGPROBS
from blaze.types import MAX_PRIORITY

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 4096
MAX_STOP_TOKENS = 128
MAX_CHOICES = 128  # of one request, all prompts together

Seed = Annotated[int, Field(ge=-SEED_BOUND, lt=SEED_BOUND)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    # OpenAI's parameters that this version does not have: accepted at values that ask for nothing.
    UNSUPPORTED: ClassVar[dict[str, tuple[object, ...]]] = {}

    model: str

    @model_validator(mode="after")
    def _nothing_unsupported(self) -> Self:
        for name, neutral in self.UNSUPPORTED.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise ValueError(f"{name}: not supported by this version")
        return self


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    include_usage: bool | None = None


class TextBody(Body):
    """What chat and completions have in common."""

    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Seed | None = None
    stop: str | tuple[str, ...] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    # Under the names of transformers and vLLM.
    top_k: Index | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    min_tokens: Index | None = None
    stop_token_ids: Annotated[tuple[Index, ...], Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None

    @field_validator("stop")
    @classmethod
    def _stop_strings(cls, stop: str | tuple[str, ...] | None) -> tuple[str, ...]:
        stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
        if len(stops) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings")
        for one in stops:
            if not one:
                raise ValueError("a stop string must not be empty")
            if len(one) > MAX_STOP_CHARACTERS:
                raise ValueError(f"a stop string has at most {MAX_STOP_CHARACTERS} characters")
        return stops

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _keys_are_token_ids(cls, bias: Any) -> Any:
        """Before the values: an error there would name the client's key as if it were a field of ours."""
        if isinstance(bias, dict) and not all(isinstance(k, str) and _TOKEN_ID.fullmatch(k) for k in bias):
            raise ValueError("the keys must be token ids")
        return bias

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> TextBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed with stream: true")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        assert not isinstance(self.stop, str)  # the validator made it a tuple
        return self.stop or ()

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatCompletionRequest(TextBody):
    UNSUPPORTED: ClassVar[dict[str, tuple[object, ...]]] = {
        "tool_choice": ("none", "auto"),
        "functions": ((),),
        "response_format": ({"type": "text"},),
    }

    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: tuple[dict[str, Any], ...] | None = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _top_logprobs_come_with_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only allowed with logprobs: true")
        return self


class CompletionRequest(TextBody):
    UNSUPPORTED: ClassVar[dict[str, tuple[object, ...]]] = {"best_of": (1,), "suffix": ("",)}

    prompt: str | tuple[int, ...] | tuple[str, ...] | tuple[tuple[int, ...], ...]
    max_tokens: Index | None = None  # 0: only the prompt is given back
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _choices_in_bounds(self) -> Self:
        num_prompts = len(self.prompts)
        if num_prompts > MAX_CHOICES:
            raise ValueError(f"prompt: at most {MAX_CHOICES} prompts")
        if num_prompts * (self.n or 1) > MAX_CHOICES:
            raise ValueError(f"n: at most {MAX_CHOICES} choices, those of all prompts together")
        return self

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """Each a text or token ids; most requests have one."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if self.prompt and not isinstance(self.prompt[0], int):
            return cast("tuple[str | tuple[int, ...], ...]", self.prompt)
        return (cast("tuple[int, ...]", self.prompt),)


Schema = TypeVar("Schema", bound=BaseModel)


def parse(schema: type[Schema], body: bytes) -> Schema:
    """Raises :class:`InvalidRequest` naming the first wrong field."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise _first_of(error) from None


def parse_fields(schema: type[Schema], fields: Mapping[str, object]) -> Schema:
    """Raises :class:`InvalidRequest` naming the first wrong field."""
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise _first_of(error) from None


def _first_of(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_input=False)[0]
    return _invalid(first["type"], first["loc"], first["msg"])


def _invalid(kind: str, loc: tuple[int | str, ...], message: str) -> InvalidRequest:
    if kind == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {message.removeprefix('Invalid JSON: ')}")
    if not loc and kind == "model_type":
        return InvalidRequest("The body must be a JSON object.")
    reason = message.removeprefix("Value error, ")
    if not loc:  # a rule over several fields: its message starts with the field's name
        return InvalidRequest(reason, param=reason.partition(":")[0])
    param = field_path(_known_part(loc))
    return InvalidRequest(f"{param}: {reason}", param=param)


def _known_part(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Without the names that pydantic gives to the members of a union (``str``, ``tuple[int, ...]``).

    Nor keys of the client's own that are longer than any field's: they are not echoed.
    """
    return tuple(part for part in loc if isinstance(part, int) or _is_field(part))


def _is_field(part: str) -> bool:
    return part.isidentifier() and part != "str" and len(part) <= 64
