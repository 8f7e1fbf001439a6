from __future__ import annotations

import json
from typing import Any

import pytest
from jinja2.exceptions import TemplateError

from blaze.engines.llm.prompts import PromptEncoder
from blaze.errors import ContextLengthExceeded, InvalidRequest
from blaze.types import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from tests.fake_models import CharacterTokenizer
from tests.samples import text_request

CONTEXT = 32


def encode(prompt: Prompt | str, *, tokenizer: Any = None, **sampling: Any) -> tuple[int, ...]:
    encoder = PromptEncoder(
        tokenizer or CharacterTokenizer(),
        vocabulary_size=128,
        max_model_len=CONTEXT,
    )
    return encoder.encode(text_request(prompt, **sampling))


def refusal(prompt: Prompt | str, **options: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        encode(prompt, **options)
    return caught.value


def test_text_tokens_and_messages_become_ids() -> None:
    assert encode(TextPrompt("ab")) == (97, 98)
    assert encode(TokenPrompt((5, 6))) == (5, 6)
    assert encode("ab") == (ord(">"), 97, 98)


def test_a_token_without_an_embedding_is_refused_though_the_tokenizer_knows_it() -> None:
    assert refusal(TextPrompt("a\u00e9")).param == "prompt"
    assert refusal(ChatPrompt((ChatMessage("user", "\u00e9"),))).param == "messages"


def test_half_a_character_is_refused() -> None:
    assert refusal(TextPrompt("a\ud800")).param == "prompt"


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


def test_a_prompt_that_is_only_given_back_may_fill_the_context() -> None:
    assert len(encode(TextPrompt("x" * CONTEXT), max_tokens=0, echo=True)) == CONTEXT
    assert refusal(TextPrompt("x" * (CONTEXT + 1)), max_tokens=0, echo=True).code == "context_length_exceeded"


def test_a_least_number_of_tokens_must_fit_too() -> None:
    error = refusal(TextPrompt("x" * 22), min_tokens=11)
    assert isinstance(error, ContextLengthExceeded)
    assert "11" in error.message
    assert len(encode(TextPrompt("x" * 22), min_tokens=10)) == 22


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


@pytest.mark.parametrize("token", [128, 999_999_999])
def test_case_04_token_ids_of_the_sampling_are_held_to_the_vocabulary(token: int) -> None:
    for name, value in (("logit_bias", ((1, 5.0), (token, 5.0))), ("stop_token_ids", (1, token))):
        error = refusal("hi", **{name: value})
        assert (error.http_status, error.param) == (400, name)
        assert str(token) in error.message
    assert encode(TextPrompt("a"), logit_bias=((127, 1.0),), stop_token_ids=(0,)) == (97,)


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


@pytest.mark.parametrize("empty", ["", None])
def test_case_08_an_empty_assistant_turn_is_a_turn(empty: str | None) -> None:
    turns = (ChatMessage("user", "a"), ChatMessage("assistant", empty), ChatMessage("user", "b"))
    assert encode(ChatPrompt(turns)) == tuple(map(ord, ">a>>b"))


# --- Tools -------------------------------------------------------------------------------------------

TEMPLATE = """\
{%- if tools %}{{ tools | tojson }}
{% endif %}
{%- for message in messages %}
{{- '<' ~ message.role }}
{%- if message.tool_call_id %}{{ ' ' ~ message.tool_call_id }}{% endif -%}
{{- '>' ~ message.content }}
{%- for call in message.tool_calls or () %}
{{- call.id ~ ' ' ~ call.function.name }}
{%- if call.function.arguments is mapping %}
{%- for name, value in call.function.arguments | items %}{{ ' ' ~ name ~ '=' ~ value }}{% endfor %}
{%- else %}{{ ' as text: ' ~ call.function.arguments }}{% endif %}
{%- endfor %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture
def tokenizer() -> Any:
    """transformers' own, of one token a byte, so that the template is rendered as it is in earnest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: token for token, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE)


def rendered(tokenizer: Any, prompt: ChatPrompt) -> str:
    encoder = PromptEncoder(tokenizer, vocabulary_size=256, max_model_len=4096)
    text: str = tokenizer.decode(encoder.encode(text_request(prompt)))
    return text


def call(arguments: str, **more: Any) -> str:
    return json.dumps(
        [{"id": "c-1", "type": "function", "function": {"name": "look", "arguments": arguments}, **more}]
    )


def test_tools_are_shown_as_the_client_wrote_them(tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"strict": True, "name": "look", "description": "é <b>"}}]
    prompt = ChatPrompt((ChatMessage("user", "hi"),), tools=json.dumps(tools))
    shown, _, rest = rendered(tokenizer, prompt).partition("\n")
    assert shown == json.dumps(tools, ensure_ascii=False)
    assert rest == "<user>hi\n<assistant>"


def test_no_tools_are_no_tools(tokenizer: Any) -> None:
    assert rendered(tokenizer, ChatPrompt((ChatMessage("user", "hi"),))) == "<user>hi\n<assistant>"


def test_arguments_are_a_mapping_for_the_template(tokenizer: Any) -> None:
    turns = (
        ChatMessage("user", "where?"),
        ChatMessage("assistant", "", tool_calls=call('{"at": "door", "times": 2}')),
        ChatMessage("tool", "dark", tool_call_id="c-1"),
    )
    assert rendered(tokenizer, ChatPrompt(turns)) == (
        "<user>where?\n<assistant>c-1 look at=door times=2\n<tool c-1>dark\n<assistant>"
    )


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [("", ""), ("{}", ""), ("{at", " as text: {at"), ("[1]", " as text: [1]"), ("5", " as text: 5")],
)
def test_arguments_that_are_no_mapping_are_shown_as_they_are(
    tokenizer: Any, arguments: str, shown: str
) -> None:
    turn = ChatMessage("assistant", "", tool_calls=call(arguments))
    assert rendered(tokenizer, ChatPrompt((turn,))) == f"<assistant>c-1 look{shown}\n<assistant>"


def test_a_turn_of_calls_alone_has_empty_content(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace("message.content", "message.content.strip()")
    turn = ChatMessage("assistant", None, tool_calls=call("{}"))
    assert rendered(tokenizer, ChatPrompt((turn,))) == "<assistant>c-1 look\n<assistant>"


@pytest.mark.parametrize("wrong", ["look", "5", "{}", "[5]", ""])
def test_tools_from_a_handle_that_are_no_array_of_objects_are_refused(tokenizer: Any, wrong: str) -> None:
    user = ChatMessage("user", "hi")
    assert refusal(ChatPrompt((user,), tools=wrong), tokenizer=tokenizer).param == "tools"
    turn = ChatMessage("assistant", None, tool_calls=wrong)
    assert refusal(ChatPrompt((user, turn)), tokenizer=tokenizer).param == "messages"
