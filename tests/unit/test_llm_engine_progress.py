"""What an engine's account of itself lets others see: a long step, a wedged thread, a reader who is away."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import aclosing

import pytest

from blaze.types import TextPrompt
from tests.llm_bench import EngineBench
from tests.samples import text_request
from tests.waiting import until, until_status


def cpu_s(bench: EngineBench) -> float:
    found = bench.engine._progress._cpu_s()
    assert found is not None
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no clocks of their own there")
async def test_a_long_step_uses_the_processor_and_a_wedged_one_does_not(bench: EngineBench) -> None:
    goes_on, at_the_gate = threading.Event(), threading.Event()

    def compute() -> None:
        while not goes_on.is_set():
            sum(range(1000))
        at_the_gate.set()
        bench.gate()

    bench.runner.before_step = compute
    bench.gate.open.clear()
    asking = asyncio.create_task(bench.ask(text_request(TextPrompt("c"))))
    await until_status(bench.engine, running=1)
    begun = cpu_s(bench)
    await until(lambda: cpu_s(bench) > begun + 0.05)
    goes_on.set()
    await until(at_the_gate.is_set)
    waits_since = asyncio.get_running_loop().time()
    found = cpu_s(bench)
    await until(lambda: asyncio.get_running_loop().time() > waits_since + 0.1)
    assert cpu_s(bench) < found + 0.005  # less than a thread needs that counts as computing
    status = await bench.engine.get_health_status()
    assert (status.work_pending, status.compute_cpu_s is not None) == (1, True)
    bench.gate.open.set()
    await asking


async def test_a_complete_answer_that_nobody_reads_is_no_pending_work(bench: EngineBench) -> None:
    async with aclosing(bench.engine.run(text_request(TextPrompt("c")))) as answer:
        await anext(answer)
        await until_status(bench.engine, running=0, queued=0)
        assert (await bench.engine.get_health_status()).state == "idle"
