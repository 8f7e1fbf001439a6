"""From prompts to token ids, with every way in which that can fail told to the client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blaze.errors import ContextLengthExceeded, InvalidRequest
from blaze.types import ChatMessage, ChatPrompt, GenerateRequest, Prompt, TextPrompt

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

    def encode(self, request: GenerateRequest) -> tuple[int, ...]:
        """Token ids of the prompt.

        Raises :class:`InvalidRequest` for an empty prompt, ids out of the vocabulary and whatever the
        chat template raises, and :class:`ContextLengthExceeded` when prompt and requested output do
        not fit the context.
        """
        ids = self._ids(request.prompt)
        param = "messages" if isinstance(request.prompt, ChatPrompt) else "prompt"
        if not ids:
            raise InvalidRequest("The prompt is empty.", param=param)
        requested = request.sampling.max_tokens
        if len(ids) + max(requested or 0, 1) > self._max_model_len:
            raise ContextLengthExceeded(
                limit=self._max_model_len, prompt_tokens=len(ids), requested_tokens=requested, param=param
            )
        return ids

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, ChatPrompt):
            return self._chat_ids(prompt)
        if isinstance(prompt, TextPrompt):
            return tuple(self._tokenizer(prompt.text)["input_ids"])
        for token in prompt.token_ids:
            if not 0 <= token < self._vocabulary_size:
                raise InvalidRequest(
                    f"Token id {token} is not in the vocabulary of {self._vocabulary_size}.", param="prompt"
                )
        return prompt.token_ids

    def _chat_ids(self, prompt: ChatPrompt) -> tuple[int, ...]:
        from jinja2.exceptions import TemplateError

        if not self._tokenizer.chat_template:
            raise InvalidRequest("This model has no chat template; use /v1/completions.", param="messages")
        try:
            encoded = self._tokenizer.apply_chat_template(
                [_as_template_message(message) for message in prompt.messages],
                add_generation_prompt=True,
                return_dict=True,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(
                f"The model's chat template refused the messages: {error}", param="messages"
            ) from error
        return tuple(encoded["input_ids"])


def _as_template_message(message: ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    return fields
