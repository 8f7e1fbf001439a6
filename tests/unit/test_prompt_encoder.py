from __future__ import annotations

import pytest
from jinja2.exceptions import TemplateError

from blaze.engines.llm.prompts import PromptEncoder
from blaze.errors import ContextLengthExceeded, InvalidRequest
from blaze.types import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from tests.fake_models import CharacterTokenizer
from tests.samples import text_request

CONTEXT = 32


def encode(
    prompt: Prompt | str, *, tokenizer: CharacterTokenizer | None = None, max_tokens: int | None = None
) -> tuple[int, ...]:
    encoder = PromptEncoder(
        tokenizer or CharacterTokenizer(),
        vocabulary_size=128,
        max_model_len=CONTEXT,
    )
    return encoder.encode(text_request(prompt, max_tokens=max_tokens))


def refusal(prompt: Prompt | str, **options: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        encode(prompt, **options)  # type: ignore[arg-type]
    return caught.value


def test_text_tokens_and_messages_become_ids() -> None:
    assert encode(TextPrompt("ab")) == (97, 98)
    assert encode(TokenPrompt((5, 6))) == (5, 6)
    assert encode("ab") == (ord(">"), 97, 98)


# --- The context -------------------------------------------------------------------------------------


def test_case_05_a_prompt_that_leaves_no_room_for_a_token_is_refused() -> None:
    for length in (CONTEXT, CONTEXT + 1):
        error = refusal(TextPrompt("x" * length))
        assert isinstance(error, ContextLengthExceeded)
        assert str(length) in error.message
        assert str(CONTEXT) in error.message
    assert len(encode(TextPrompt("x" * (CONTEXT - 1)))) == CONTEXT - 1


def test_case_05_prompt_and_requested_tokens_together_are_refused_with_all_three_numbers() -> None:
    error = refusal(TextPrompt("x" * 22), max_tokens=11)
    assert isinstance(error, ContextLengthExceeded)
    assert all(number in error.message for number in ("32", "22", "11"))
    assert len(encode(TextPrompt("x" * 22), max_tokens=10)) == 22


def test_case_05_the_error_is_about_the_field_the_prompt_came_in() -> None:
    assert refusal("x" * 100).param == "messages"
    assert refusal(TextPrompt("x" * 100)).param == "prompt"


# --- What cannot be encoded --------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [TextPrompt(""), TokenPrompt(())])
def test_an_empty_prompt_is_refused(prompt: Prompt) -> None:
    assert refusal(prompt).param == "prompt"


@pytest.mark.parametrize("token", [128, 999_999_999, -1])
def test_case_04_a_token_out_of_the_vocabulary_is_refused(token: int) -> None:
    error = refusal(TokenPrompt((1, token)))
    assert error.param == "prompt"
    assert str(token) in error.message


@pytest.mark.parametrize(
    "raised",
    [TemplateError("Only user and assistant roles are supported!"), ValueError("roles must alternate")],
)
def test_case_08_what_the_template_says_is_what_the_client_reads(raised: Exception) -> None:
    error = refusal("hi", tokenizer=CharacterTokenizer(refuses=raised))
    assert (error.http_status, error.param, error.is_failure) == (400, "messages", False)
    assert str(raised) in error.message


def test_case_08_a_model_without_a_template_serves_completions_only() -> None:
    base = CharacterTokenizer(chat_template=None)
    error = refusal("hi", tokenizer=base)
    assert (error.http_status, error.param) == (400, "messages")
    assert "chat template" in error.message
    assert encode(TextPrompt("hi"), tokenizer=base) == (104, 105)


def test_case_08_an_empty_assistant_turn_is_a_turn() -> None:
    turns = (ChatMessage("user", "a"), ChatMessage("assistant", ""), ChatMessage("user", "b"))
    assert encode(ChatPrompt(turns)) == tuple(map(ord, ">a>>b"))
