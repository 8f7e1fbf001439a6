"""From OpenAI's bodies to ``blaze.types``, and from events to OpenAI's objects."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from blaze.api.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from blaze.api.messages import Message
from blaze.api.schemas import ChatCompletionRequest, CompletionRequest, TextBody
from blaze.errors import ErrorInfo
from blaze.sampling_params import SamplingParams
from blaze.types import (
    Caller,
    ChatMessage,
    ChatPrompt,
    ChoiceFinished,
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    ImageReady,
    TextDelta,
    TextPrompt,
    TokenPrompt,
    Usage,
)

# --- Requests --------------------------------------------------------------------------------------


def chat_request(body: ChatCompletionRequest, request_id: str, caller: Caller) -> GenerateRequest:
    tools = body.tools if body.tools and body.tool_choice != "none" else None
    prompt = ChatPrompt(
        messages=tuple(_message(message) for message in body.messages),
        tools=None if tools is None else json.dumps(tools),
    )
    sampling = _sampling(
        body,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return GenerateRequest(
        request_id, body.model, prompt, sampling, priority=body.priority or 0, caller=caller
    )


def completion_requests(
    body: CompletionRequest, request_id: str, caller: Caller
) -> tuple[GenerateRequest, ...]:
    """One request per prompt. All have the seed that was given: each answers as it would alone."""
    sampling = _sampling(
        body,
        # OpenAI's default for completions is 16 tokens; for chat it is what is left of the context.
        max_tokens=16 if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        echo=bool(body.echo),
    )
    prompts = body.prompts
    return tuple(
        GenerateRequest(
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{number}",
            model=body.model,
            prompt=TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(prompt),
            sampling=sampling,
            priority=body.priority or 0,
            caller=caller,
        )
        for number, prompt in enumerate(prompts)
    )


def _message(message: Message) -> ChatMessage:
    content = message.content
    return ChatMessage(
        role=message.role,
        content="".join(part.text for part in content) if isinstance(content, tuple) else content,
        name=message.name,
        tool_calls=json.dumps(message.tool_calls) if message.tool_calls else None,
        tool_call_id=message.tool_call_id,
    )


def _sampling(
    body: TextBody, *, max_tokens: int | None, logprobs: int | None, echo: bool = False
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()),
        seed=body.seed,
        stop=body.stop_strings,
        stop_token_ids=body.stop_token_ids or (),
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        n=body.n or 1,
        logprobs=logprobs,
        echo=echo,
    )


# --- Answers ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class ChoiceText:
    text: str = ""
    reason: FinishReason | None = None
    scored: list[TextDelta] = field(default_factory=list)  # those with log probabilities


@dataclass(slots=True)
class Answer:
    """What a complete answer amounts to."""

    choices: dict[int, ChoiceText] = field(default_factory=dict)
    images: list[ImageReady] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, TextDelta):
                choice = self.choices.setdefault(event.index, ChoiceText())
                choice.text += event.text
                if event.logprobs:
                    choice.scored.append(event)
            elif isinstance(event, ChoiceFinished):
                self.choices.setdefault(event.index, ChoiceText()).reason = event.reason
            elif isinstance(event, ImageReady):
                self.images.append(event)
            elif isinstance(event, Finished):
                self.usage = event.usage


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def chat_object(answer: Answer, answer_id: str, model: str, created: int) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": _chat_logprobs(choice),
            "finish_reason": choice.reason,
        }
        for index, choice in sorted(answer.choices.items())
    ]
    return _text_object("chat.completion", answer, choices, answer_id, model, created)


def _chat_logprobs(choice: ChoiceText) -> dict[str, Any] | None:
    if not choice.scored:
        return None
    return chat_logprobs(token for delta in choice.scored for token in delta.logprobs or ())


def completion_object(answer: Answer, answer_id: str, model: str, created: int) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": choice.text,
            "logprobs": completion_logprobs(choice.scored, TextOffsets()) if choice.scored else None,
            "finish_reason": choice.reason,
        }
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


def error_object(info: ErrorInfo) -> dict[str, Any]:
    return {"error": {"message": info.message, "type": info.type, "param": info.param, "code": info.code}}
