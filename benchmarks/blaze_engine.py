"""Blaze's LLM engine as a worker, by its public, asynchronous interface; set up as a replica sets it up."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

from benchmarks.worker import Line
from blaze.engines.openmp import share_cores

if TYPE_CHECKING:
    from blaze.engines.llm.engine import LLMEngine


@asynccontextmanager
async def running(**options: Any) -> AsyncGenerator[LLMEngine]:
    share_cores()
    from benchmarks.smollm2 import SOURCE
    from blaze.config import cache_dir
    from blaze.engine_config import LLMConfig
    from blaze.engines.llm.engine import LLMEngine
    from blaze.models.sources import parse_source

    engine = LLMEngine(
        parse_source(SOURCE), LLMConfig(**options), threads=os.cpu_count() or 1, cache=cache_dir()
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def answer(engine: LLMEngine, prompt: Sequence[int], tokens: int) -> tuple[float, int]:
    """Seconds to the first token, and how many came; greedy, and as many as asked for."""
    from blaze.sampling_params import SamplingParams
    from blaze.types import Failed, Finished, GenerateRequest, TextDelta, TokenPrompt

    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    started = time.perf_counter()
    first: float | None = None
    request = GenerateRequest("r", "m", TokenPrompt(tuple(prompt)), sampling)
    async with aclosing(engine.run(request)) as batches:
        async for events in batches:
            for event in events:
                if isinstance(event, TextDelta) and first is None:
                    first = time.perf_counter() - started
                elif isinstance(event, Failed):
                    raise RuntimeError(event.error.message)
                elif isinstance(event, Finished) and first is not None:
                    return first, event.usage.completion_tokens
    raise RuntimeError("an answer without an end")


async def main(options: dict[str, Any]) -> None:
    line = Line()
    async with running(**options) as engine:
        line.send({})
        for command in line.commands():  # blocks the event loop, and there is nothing else on it
            started = time.perf_counter()
            answers = await asyncio.gather(
                *(answer(engine, prompt, command["tokens"]) for prompt in command["prompts"])
            )
            seconds = time.perf_counter() - started
            line.send({"seconds": seconds, "tokens": sum(count for _, count in answers)})


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
