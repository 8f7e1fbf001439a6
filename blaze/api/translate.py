"""From OpenAI's bodies to ``blaze.types``, and from events to OpenAI's objects."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from blaze.api.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    ImageGenerationRequest,
    Message,
    TextBody,
)
from blaze.errors import ErrorInfo, InvalidRequest
from blaze.types import (
    ChatMessage,
    ChatPrompt,
    ChoiceFinished,
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    ImageReady,
    ImageRequest,
    Prompt,
    SamplingParams,
    TextDelta,
    TextPrompt,
    TokenPrompt,
    Usage,
)

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


# --- Requests --------------------------------------------------------------------------------------


def chat_request(body: ChatCompletionRequest, request_id: str) -> GenerateRequest:
    prompt = ChatPrompt(tuple(_message(message) for message in body.messages))
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    return GenerateRequest(request_id, body.model, prompt, _sampling(body, limit))


def completion_request(body: CompletionRequest, request_id: str) -> GenerateRequest:
    # OpenAI's default for completions is 16 tokens; for chat it is what is left of the context.
    limit = body.max_tokens if body.max_tokens is not None else 16
    return GenerateRequest(request_id, body.model, _completion_prompt(body), _sampling(body, limit))


def image_request(body: ImageGenerationRequest, request_id: str) -> ImageRequest:
    width, height = _size(body.size)
    return ImageRequest(
        request_id=request_id,
        model=body.model,
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        n=body.n or 1,
        width=width,
        height=height,
        num_inference_steps=body.num_inference_steps,
        guidance_scale=body.guidance_scale,
        seed=body.seed,
        output_format=body.output_format or "png",
    )


def _message(message: Message) -> ChatMessage:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or ())
    return ChatMessage(message.role, text, message.name)


def _sampling(body: TextBody, max_tokens: int | None) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        seed=body.seed,
        stop=body.stop_strings,
        n=body.n or 1,
        ignore_eos=bool(body.ignore_eos),
    )


def _completion_prompt(body: CompletionRequest) -> Prompt:
    prompt = body.prompt
    if isinstance(prompt, tuple) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]  # a list of one prompt
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    token_ids = tuple(item for item in prompt if isinstance(item, int))
    if len(token_ids) != len(prompt):
        raise InvalidRequest("prompt: one prompt per request.", param="prompt")
    return TokenPrompt(token_ids)


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size is None or size == "auto":
        return None, None
    match = _SIZE.fullmatch(size)
    if match is None or int(match[1]) < 1 or int(match[2]) < 1:
        raise InvalidRequest("size: expected WIDTHxHEIGHT in pixels, or auto.", param="size")
    return int(match[1]), int(match[2])


# --- Answers ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class ChoiceText:
    text: str = ""
    reason: FinishReason | None = None


@dataclass(slots=True)
class Answer:
    """What a complete answer amounts to."""

    choices: dict[int, ChoiceText] = field(default_factory=dict)
    images: list[ImageReady] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, TextDelta):
                self.choices.setdefault(event.index, ChoiceText()).text += event.text
            elif isinstance(event, ChoiceFinished):
                self.choices.setdefault(event.index, ChoiceText()).reason = event.reason
            elif isinstance(event, ImageReady):
                self.images.append(event)
            elif isinstance(event, Finished):
                self.usage = event.usage


def usage_object(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def chat_object(answer: Answer, answer_id: str, model: str, created: int) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": None,
            "finish_reason": choice.reason,
        }
        for index, choice in sorted(answer.choices.items())
    ]
    return _text_object("chat.completion", answer, choices, answer_id, model, created)


def completion_object(answer: Answer, answer_id: str, model: str, created: int) -> dict[str, Any]:
    choices = [
        {"index": index, "text": choice.text, "logprobs": None, "finish_reason": choice.reason}
        for index, choice in sorted(answer.choices.items())
    ]
    return _text_object("text_completion", answer, choices, answer_id, model, created)


def _text_object(
    kind: str, answer: Answer, choices: list[dict[str, Any]], answer_id: str, model: str, created: int
) -> dict[str, Any]:
    return {
        "id": answer_id,
        "object": kind,
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage_object(answer.usage),
    }


def images_object(answer: Answer, created: int) -> dict[str, Any]:
    """OpenAI's images object; ``seed`` draws the image again."""
    ordered = sorted(answer.images, key=lambda image: image.index)
    return {
        "created": created,
        "data": [
            {"b64_json": base64.b64encode(image.data).decode("ascii"), "seed": image.seed}
            for image in ordered
        ],
        "output_format": ordered[0].format if ordered else None,
        "size": f"{ordered[0].width}x{ordered[0].height}" if ordered else None,
    }


def error_object(info: ErrorInfo) -> dict[str, Any]:
    return {"error": {"message": info.message, "type": info.type, "param": info.param, "code": info.code}}
