"""The messages and tools of a chat, in OpenAI's shapes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator


def _names_a_function(item: dict[str, Any]) -> dict[str, Any]:
    """Checked but not rebuilt: the chat template sees the client's own fields, in the client's order."""
    if item.get("type") != "function":
        raise ValueError("type must be function")
    function = item.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("function must be an object with a name")
    return item


def _has_arguments(item: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(item["function"].get("arguments"), str):
        raise ValueError("function.arguments must be a text, as the model wrote it")
    return item


Tool = Annotated[dict[str, Any], AfterValidator(_names_a_function)]
ToolCall = Annotated[Tool, AfterValidator(_has_arguments)]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart, ...] | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_what_its_role_needs(self) -> Message:
        if self.function_call is not None:
            raise ValueError("function_call is not supported by this version; use tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to messages of the assistant")
        if self.content is None and self.role != "assistant":
            raise ValueError("content is required")
        return self
