"""From prompts to token ids, with every way in which that can fail told to the client."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from blaze.errors import ContextLengthExceeded, InvalidRequest
from blaze.types import ChatMessage, ChatPrompt, GenerateRequest, Prompt, TextPrompt, TokenId

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptEncoder:
    """Not safe on several threads: a fast tokenizer keeps state while it encodes."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, vocabulary_size: int, max_model_len: int
    ) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._max_model_len = max_model_len

    def encode(self, request: GenerateRequest) -> tuple[TokenId, ...]:
        """Token ids of the prompt.

        Raises :class:`InvalidRequest` for an empty prompt, ids out of the vocabulary (also those of the
        sampling parameters) and whatever the chat template raises, and :class:`ContextLengthExceeded`
        when prompt and requested output do not fit the context.
        """
        sampling = request.sampling
        self._check_known(sampling.stop_token_ids, "stop_token_ids")
        self._check_known((token for token, _ in sampling.logit_bias), "logit_bias")
        self._check_known((token for tokens in request.generated for token in tokens), "generated")
        ids = self._ids(request.prompt)
        param = "messages" if isinstance(request.prompt, ChatPrompt) else "prompt"
        if not ids:
            raise InvalidRequest("The prompt is empty.", param=param)
        requested = sampling.min_tokens or None if sampling.max_tokens is None else sampling.max_tokens
        # A tokenizer may know tokens that the model has no embedding for: added ones, written into a text.
        self._check_known(ids, param)
        if len(ids) + (1 if requested is None else requested) > self._max_model_len:
            raise ContextLengthExceeded(
                limit=self._max_model_len, prompt_tokens=len(ids), requested_tokens=requested, param=param
            )
        return ids

    def _check_known(self, token_ids: Iterable[TokenId], param: str) -> None:
        for token in token_ids:
            if not 0 <= token < self._vocabulary_size:
                raise InvalidRequest(
                    f"Token id {token} is not in the vocabulary of {self._vocabulary_size}.", param=param
                )

    def _ids(self, prompt: Prompt) -> tuple[TokenId, ...]:
        if isinstance(prompt, ChatPrompt):
            return self._chat_ids(prompt)
        if isinstance(prompt, TextPrompt):
            _check_encodable(prompt.text)
            return tuple(self._tokenizer(prompt.text)["input_ids"])
        return prompt.token_ids

    def _chat_ids(self, prompt: ChatPrompt) -> tuple[TokenId, ...]:
        from jinja2.exceptions import TemplateError

        if not self._tokenizer.chat_template:
            raise InvalidRequest("This model has no chat template; use /v1/completions.", param="messages")
        messages = [_as_template_message(message) for message in prompt.messages]
        tools = {} if prompt.tools is None else {"tools": _parsed(prompt.tools, "tools")}
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, **tools
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(
                f"The model's chat template refused the messages: {error}", param="messages"
            ) from error
        return tuple(encoded["input_ids"])


def _check_encodable(text: str) -> None:
    """HTTP clients cannot send lone surrogates, but calls over a handle can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"The prompt is not Unicode text: {error}", param="prompt") from error


def _as_template_message(message: ChatMessage) -> dict[str, Any]:
    # transformers drops what is None, and many templates fail without a content.
    fields: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_calls is not None:
        fields["tool_calls"] = list(map(_as_template_call, _parsed(message.tool_calls, "messages")))
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _parsed(text: str, param: str) -> list[dict[str, Any]]:
    """HTTP clients cannot send anything else, but calls over a handle pass through no other validation."""
    try:
        items = json.loads(text)
    except ValueError:
        items = None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InvalidRequest("Tools and tool calls must be a JSON array of objects.", param=param)
    return items


def _as_template_call(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's clients send arguments as the model wrote them, JSON in a text; templates want a mapping."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:  # what the model wrote was no JSON: shown to it again as it was
        return call
    if not isinstance(arguments, dict):
        return call
    return call | {"function": function | {"arguments": arguments}}
