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

from blaze.checks import check, check_integer, check_seed, check_text, check_timeout, is_count, is_number
from blaze.errors import ErrorInfo
from blaze.sampling_params import SamplingParams

ReplicaId: TypeAlias = str
TokenId: TypeAlias = int
FinishReason: TypeAlias = Literal["stop", "length"]
ImageFormat: TypeAlias = Literal["png", "jpeg", "webp"]

MAX_PRIORITY = 1000
MAX_CALLER_TEXT = 1024
MAX_PARTIAL_IMAGES = 3


class EngineKind(StrEnum):
    LLM = "llm"
    DIFFUSION = "diffusion"
    SIMULATOR = "simulator"


# --- Requests --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caller:
    """Who asks, as far as it decides where the request goes."""

    session_id: str | None = None
    user: str | None = None
    address: str | None = None  # normalised, and from somebody who can be trusted to know it

    def __post_init__(self) -> None:
        """Raises :class:`InvalidRequest`: calls over a handle pass through no other validation."""
        for name in ("session_id", "user", "address"):
            value = getattr(self, name)
            good = value is None or (isinstance(value, str) and len(value) <= MAX_CALLER_TEXT)
            check(good, name, f"must be text, at most {MAX_CALLER_TEXT} characters")


@dataclass(frozen=True)
class ChatMessage:
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None
    name: str | None = None
    tool_calls: str | None = None  # JSON array, as the client sent it
    tool_call_id: str | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """Messages that the model's own chat template turns into tokens."""

    messages: tuple[ChatMessage, ...]
    tools: str | None = None  # JSON array, as the client sent it: the template decides what becomes of it


@dataclass(frozen=True)
class TextPrompt:
    text: str


@dataclass(frozen=True)
class TokenPrompt:
    token_ids: tuple[TokenId, ...]


Prompt: TypeAlias = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True)
class GenerateRequest:
    """Text generation. ``timeout_s``: seconds left of the deadline when the value was made.

    ``generated[i]``: tokens that choice ``i`` has already, from an engine that could not go on. They count
    as output (limits, penalties, stop strings, draws), and their events are not sent again.
    """

    request_id: str
    model: str
    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    timeout_s: float | None = None
    priority: int = 0  # lower is served first
    generated: tuple[tuple[TokenId, ...], ...] = ()
    variant: str = ""  # of the engine that ``generated`` comes from; an engine of another one refuses
    caller: Caller = Caller()

    def __post_init__(self) -> None:
        """Raises :class:`InvalidRequest`: calls over a handle pass through no other validation."""
        check(
            type(self.priority) is int and abs(self.priority) <= MAX_PRIORITY,
            "priority",
            f"must be an integer, at most {MAX_PRIORITY} either way",
        )
        check(len(self.generated) in (0, self.sampling.n), "generated", "must have one entry per choice")
        check_timeout(self.timeout_s)


@dataclass(frozen=True)
class ImageRequest:
    """An image of text, of an image, or of both; names and meanings are diffusers'. None: the model's own
    default.

    Image ``i`` of ``n`` is drawn with ``seed + i`` (mod 2**63). ``image``: encoded, to begin with; ``mask``:
    encoded too, and edits only what it marks: where its alpha is 0, or where it is white if it has no alpha.
    ``adapters``: LoRA adapters of the config by name, each with its scale. ``partial_images``: so many
    previews on the way.
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
    output_compression: int | None = None  # quality of jpeg and webp, 0 to 100
    image: bytes | None = None
    mask: bytes | None = None
    strength: float | None = None  # how much of ``image`` is drawn anew: 0 to 1
    scheduler: str | None = None
    eta: float | None = None
    clip_skip: int | None = None
    adapters: tuple[tuple[str, float], ...] = ()
    partial_images: int = 0
    progress: bool = False  # the reader wants to hear of steps as they are done
    timeout_s: float | None = None
    caller: Caller = Caller()

    def __post_init__(self) -> None:
        """Raises :class:`InvalidRequest`: calls over a handle pass through no other validation."""
        check(is_count(self.n), "n", "must be an integer, at least 1")
        check_timeout(self.timeout_s)
        check_text(self.prompt, "prompt")
        check_text(self.negative_prompt, "negative_prompt")
        self._check_extras()
        for name in ("width", "height", "num_inference_steps"):
            value = getattr(self, name)
            check(value is None or is_count(value), name, "must be an integer, at least 1")
        check(
            self.guidance_scale is None
            or (is_number(self.guidance_scale) and 0 <= self.guidance_scale <= 1000),
            "guidance_scale",
            "must be 0 to 1000",
        )
        check_seed(self.seed)

    def _check_extras(self) -> None:
        for name in ("strength", "eta"):
            value = getattr(self, name)
            check(value is None or (is_number(value) and 0 <= value <= 1), name, "must be 0 to 1")
        check_integer(self.clip_skip, "clip_skip", 1, 1000)
        check_integer(self.output_compression, "output_compression", 0, 100)
        check(self.partial_images is not None, "partial_images", "must be an integer")
        check_integer(self.partial_images, "partial_images", 0, MAX_PARTIAL_IMAGES)
        check(self.mask is None or self.image is not None, "mask", "needs an image to edit")
        check(self.strength is None or self.image is not None, "strength", "needs an image to begin with")
        for name, scale in self.adapters:
            good = isinstance(name, str) and is_number(scale) and abs(scale) <= 10
            check(good, "adapters", "must be names with scales between -10 and 10")


Request: TypeAlias = GenerateRequest | ImageRequest


# --- Events ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    images: int = 0
    cached_tokens: int = 0  # of the prompt's, those whose keys and values were at hand


@dataclass(frozen=True)
class TopLogprob:
    token: str
    token_id: TokenId
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """Of the model's own distribution, before temperature, penalties and filters (natural logarithm)."""

    token: str
    token_id: TokenId
    logprob: float | None  # None: the first token of a prompt, which nothing precedes
    top: tuple[TopLogprob, ...] = ()  # the likeliest, best first


@dataclass(frozen=True)
class Started:
    """The engine has taken the request up. Diffusion engines send no token ids.

    ``variant``: the model's revision, its type of numbers, its quantization. Where it differs, an answer does
    not go on token for token.
    """

    prompt_token_ids: tuple[TokenId, ...] = ()
    variant: str = ""


@dataclass(frozen=True)
class TextDelta:
    """New text of choice ``index``, and the ids it came from (text may lag behind the ids).

    ``logprobs``: one per id. ``echo``: this is the prompt given back, not output.
    """

    index: int
    text: str
    token_ids: tuple[TokenId, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    echo: bool = False


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
class PartialImage:
    """A preview of image ``index``, the ``number``-th (from 0) of those asked for: encoded as the image will
    be. The same again when the request begins anew elsewhere, and then not shown again."""

    index: int
    number: int
    data: bytes
    format: ImageFormat
    width: int
    height: int


@dataclass(frozen=True)
class Finished:
    usage: Usage


@dataclass(frozen=True)
class Failed:
    error: ErrorInfo


TerminalEvent: TypeAlias = Finished | Failed
Event: TypeAlias = (
    Started | TextDelta | ChoiceFinished | ImageReady | Progress | PartialImage | Finished | Failed
)
Events: TypeAlias = tuple[Event, ...]  # several to a message when the reader is slower than the engine


def is_batch(events: object) -> bool:
    """Whether this can be :data:`Events`: a replica of another version may say anything."""
    return isinstance(events, tuple) and len(events) > 0 and all(isinstance(e, Event) for e in events)
