"""Values that cross layers and processes: frozen dataclasses, standard library only.

A request travels down as :class:`GenerateRequest` or :class:`ImageRequest`; its answer travels back as
a sequence of events that ends with exactly one terminal event, :class:`Finished` or :class:`Failed`.

No ``slots``: these values are pickled between processes for every token, and a frozen dataclass with slots
is pickled by Python code, one without by C.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeAlias

from blaze.errors import ErrorInfo, InvalidRequest

ReplicaId: TypeAlias = str
TokenId: TypeAlias = int
FinishReason: TypeAlias = Literal["stop", "length"]
ImageFormat: TypeAlias = Literal["png", "jpeg", "webp"]

SEED_BOUND = 2**63  # seeds are int64: -SEED_BOUND <= seed < SEED_BOUND


class EngineKind(StrEnum):
    LLM = "llm"
    DIFFUSION = "diffusion"
    SIMULATOR = "simulator"


# --- Requests --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatMessage:
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: str | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """Messages that the model's own chat template turns into tokens."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True)
class TextPrompt:
    text: str


@dataclass(frozen=True)
class TokenPrompt:
    token_ids: tuple[TokenId, ...]


Prompt: TypeAlias = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 filter nothing."""

    max_tokens: int | None = None  # None: what is left of the context
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None  # None: the dispatcher draws one before the first attempt
    stop: tuple[str, ...] = ()
    n: int = 1
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raises :class:`InvalidRequest`: calls over a handle pass through no other validation."""
        _check(
            self.max_tokens is None or _is_count(self.max_tokens),
            "max_tokens",
            "must be an integer, at least 1",
        )
        _check(
            _is_number(self.temperature) and 0 <= self.temperature <= 2,
            "temperature",
            "must be between 0 and 2",
        )
        _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1")
        _check(type(self.top_k) is int and self.top_k >= 0, "top_k", "must be an integer, at least 0")
        _check(_is_count(self.n), "n", "must be an integer, at least 1")
        _check(_are_texts(self.stop), "stop", "must be a tuple of non-empty strings")
        _check_seed(self.seed)


@dataclass(frozen=True)
class GenerateRequest:
    """Text generation. ``timeout_s``: seconds left of the deadline when the value was made."""

    request_id: str
    model: str
    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    timeout_s: float | None = None


@dataclass(frozen=True)
class ImageRequest:
    """Text to image; names and meanings are diffusers'. None: the model's own default.

    Image ``i`` of ``n`` is drawn with ``seed + i`` (mod 2**63).
    """

    request_id: str
    model: str
    prompt: str
    negative_prompt: str | None = None
    n: int = 1
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    output_format: ImageFormat = "png"
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        """Raises :class:`InvalidRequest`: calls over a handle pass through no other validation."""
        _check(_is_count(self.n), "n", "must be an integer, at least 1")
        for name in ("width", "height", "num_inference_steps"):
            value = getattr(self, name)
            _check(value is None or _is_count(value), name, "must be an integer, at least 1")
        _check(
            self.guidance_scale is None
            or (_is_number(self.guidance_scale) and 0 <= self.guidance_scale <= 1000),
            "guidance_scale",
            "must be 0 to 1000",
        )
        _check_seed(self.seed)


Request: TypeAlias = GenerateRequest | ImageRequest


def _check(holds: bool, field_name: str, rule: str) -> None:
    """False also for comparisons with NaN."""
    if not holds:
        raise InvalidRequest(f"{field_name}: {rule}.", param=field_name)


def _is_count(value: int) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_texts(values: tuple[str, ...]) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, str) and value for value in values)


def _check_seed(seed: int | None) -> None:
    fits = seed is None or (type(seed) is int and -SEED_BOUND <= seed < SEED_BOUND)
    _check(fits, "seed", "must be a 64-bit signed integer")


# --- Events ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    images: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    token: str
    token_id: TokenId
    logprob: float


@dataclass(frozen=True)
class Started:
    """The engine has taken the request up. Diffusion engines send no token ids."""

    prompt_token_ids: tuple[TokenId, ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """New text of choice ``index``, and the ids it came from (text may lag behind the ids)."""

    index: int
    text: str
    token_ids: tuple[TokenId, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class ChoiceFinished:
    index: int
    reason: FinishReason


@dataclass(frozen=True)
class ImageReady:
    """One encoded image; ``seed`` is the seed that draws it again."""

    index: int
    data: bytes
    format: ImageFormat
    width: int
    height: int
    seed: int


@dataclass(frozen=True)
class Progress:
    """Denoising step ``step`` of ``total`` is done."""

    step: int
    total: int


@dataclass(frozen=True)
class Finished:
    usage: Usage


@dataclass(frozen=True)
class Failed:
    error: ErrorInfo


TerminalEvent: TypeAlias = Finished | Failed
Event: TypeAlias = Started | TextDelta | ChoiceFinished | ImageReady | Progress | Finished | Failed
Events: TypeAlias = tuple[Event, ...]  # several to a message when the reader is slower than the engine
