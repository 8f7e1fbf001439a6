"""Values that many tests need, with only what a test is about spelt out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any, Literal

from blaze.reports import TTFT_BUCKETS_S, DiffusionStatus, EngineStatus, Heartbeat, ModelCounters
from blaze.sampling_params import SamplingParams
from blaze.types import (
    Caller,
    ChatMessage,
    ChatPrompt,
    EngineKind,
    Event,
    Events,
    Failed,
    Finished,
    GenerateRequest,
    ImageReady,
    ImageRequest,
    PartialImage,
    Prompt,
    Started,
    TextDelta,
    TokenLogprob,
    TopLogprob,
    Usage,
)


def text_request(
    prompt: Prompt | str = "hi",
    *,
    timeout_s: float | None = None,
    model: str = "m",
    priority: int = 0,
    caller: Caller = Caller(),  # noqa: B008
    **sampling: Any,
) -> GenerateRequest:
    given = ChatPrompt((ChatMessage("user", prompt),)) if isinstance(prompt, str) else prompt
    return GenerateRequest(
        "r-1", model, given, SamplingParams(**sampling), timeout_s, priority=priority, caller=caller
    )


def image_request(prompt: str = "seven", **options: Any) -> ImageRequest:
    return ImageRequest("r-1", "m", prompt, **options)


def image_answer(*seeds: int) -> list[Events | Exception]:
    images = [
        ImageReady(index, b"pixels-%d" % index, "png", 32, 16, seed) for index, seed in enumerate(seeds)
    ]
    return [(Started(), *images, Finished(Usage(images=len(images))))]


def partial_image(index: int = 0, number: int = 0) -> PartialImage:
    return PartialImage(index, number, b"preview-%d-%d" % (index, number), "png", 32, 16)


def scored(token: str, logprob: float | None = -0.5, **likeliest: float) -> TokenLogprob:
    """A token with its log probability, and the likeliest ones where it stands."""
    top = tuple(TopLogprob(text, 0, value) for text, value in likeliest.items())
    return TokenLogprob(token, 0, logprob, top)


def heartbeat(
    replica_id: str = "a",
    *,
    model: str = "m",
    rank: int = 0,
    state: Literal["loading", "idle", "busy", "failed"] = "idle",
    running: int = 0,
    queued: int = 0,
    detail: str | None = None,
    diffusion: DiffusionStatus | None = None,
    steps: int = 5,
    cpu_s: float | None = None,
    actor: str = "",
) -> Heartbeat:
    kind = EngineKind.LLM if diffusion is None else EngineKind.DIFFUSION
    status = EngineStatus(
        kind, state, running, queued, steps, 0.5, detail, diffusion=diffusion, compute_cpu_s=cpu_s
    )
    return Heartbeat(replica_id, model, rank, "node-1", 4711, status, memory_bytes=1 << 20, actor=actor)


def model_counters(**values: object) -> ModelCounters:
    base: dict[str, object] = {
        "model": "m",
        "strategy": "round_robin",
        "waiting": 1,
        "outcomes": (("success", 2), ("failure", 1)),
        "prompt_tokens": 10,
        "completion_tokens": 20,
        "images": 3,
        "ttft_buckets": tuple(range(len(TTFT_BUCKETS_S))),
        "ttft_sum_s": 0.5,
    }
    return ModelCounters(**{**base, **values})  # type: ignore[arg-type]


async def collect(batches: AsyncIterator[Events]) -> list[Event]:
    return [event async for batch in batches for event in batch]


def text_of(events: Iterable[Event], index: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, TextDelta) and e.index == index)


def terminals(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, Finished | Failed)]
