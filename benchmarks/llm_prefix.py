"""What a shared prefix saves, and what a long queue costs. Blaze's LLM engine alone, SmolLM2-135M in bf16.

Time: a prompt of 1,000 tokens and 20 more, then the same 1,000 and 20 others; the second's time to its first
token over the first's. Each round has a prefix of its own.

Memory: 200 requests at once, most of which queue; the peak of the resident memory meanwhile, against what is
accounted for: the process after its imports, the weights, and the budget for keys and values. Each of the two
has a process of its own.

Run: `python -m benchmarks.llm_prefix [--rounds 7] [--json PATH]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from benchmarks import machine
from benchmarks.blaze_engine import answer, running
from benchmarks.smollm2 import folder, random_ids
from benchmarks.worker import Line
from blaze.engine_config import LLMConfig
from blaze.engines.openmp import share_cores

PREFIX_TOKENS, OWN_TOKENS = 1000, 20
QUEUED, QUEUED_PROMPT_TOKENS, QUEUED_NEW_TOKENS = 200, 256, 32
KV_BYTES = 2**29
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu", "kv_cache_memory": KV_BYTES}
_MIB = 2**20


# --- Time --------------------------------------------------------------------------------------------


async def shared_prefix(rounds: int) -> dict[str, Any]:
    draw = random.Random(0)
    first: list[float] = []
    second: list[float] = []
    async with running(**OPTIONS) as engine:
        for number in range(-1, rounds):  # one before the first, which is not counted
            prefix = random_ids(draw, PREFIX_TOKENS)
            for found in (first, second):
                ttft_s, _ = await answer(engine, prefix + random_ids(draw, OWN_TOKENS), 2)
                if number >= 0:
                    found.append(ttft_s * 1000)
    ratios = [later / earlier for earlier, later in zip(first, second, strict=True)]
    return {"first_ms": first, "second_ms": second, "ratio": statistics.median(ratios), "ratios": ratios}


# --- Memory ------------------------------------------------------------------------------------------


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5)


def peak() -> int:
    """The most resident memory since the start, or since it was forgotten; by the kernel's own account."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def weight_bytes() -> int:
    """In bf16; counted in the file, which has them in fp32 and tied weights once."""
    from safetensors import safe_open

    total = 0
    for path in folder().glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                count = 1
                for size in file.get_slice(name).get_shape():
                    count *= size
                total += 2 * count
    return total


async def queue_memory(requests: int) -> dict[str, Any]:
    share_cores()
    import_module("blaze.engines.llm.engine")
    import_module("transformers.models.llama.modeling_llama")  # what loading would import
    imported = resident()
    draw = random.Random(1)
    prompts = [random_ids(draw, QUEUED_PROMPT_TOKENS) for _ in range(requests)]
    batch = [random_ids(draw, QUEUED_PROMPT_TOKENS) for _ in range(LLMConfig().max_batch_size)]
    async with running(**OPTIONS) as engine:
        loaded, load_peak = resident(), peak()
        forget_peak()
        await asyncio.gather(*(answer(engine, prompt, QUEUED_NEW_TOKENS) for prompt in batch))
        batch_peak = peak()
        forget_peak()
        most_queued, started = 0, time.perf_counter()
        answers = asyncio.gather(*(answer(engine, prompt, QUEUED_NEW_TOKENS) for prompt in prompts))
        while not answers.done():
            most_queued = max(most_queued, (await engine.get_health_status()).queued)
            await asyncio.wait([answers], timeout=0.05)
        tokens = sum(count for _, count in await answers)
        seconds, queue_peak = time.perf_counter() - started, peak()
    if tokens != requests * QUEUED_NEW_TOKENS:
        raise RuntimeError(f"{tokens} tokens came")
    accounted = imported + weight_bytes() + KV_BYTES
    return {
        "imports_bytes": imported,
        "weights_bytes": weight_bytes(),
        "kv_bytes": KV_BYTES,
        "accounted_bytes": accounted,
        "loaded_bytes": loaded,
        "load_peak_bytes": load_peak,
        "batch_peak_bytes": batch_peak,
        "queue_peak_bytes": queue_peak,
        "peak_to_accounted": queue_peak / accounted,
        "requests": requests,
        "most_queued": most_queued,
        "seconds": seconds,
    }


# --- The two processes, and the report ---------------------------------------------------------------


def in_a_process(part: str, size: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.llm_prefix", "--part", part, "--size", str(size)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{part} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def report(prefix: dict[str, Any], memory: dict[str, Any]) -> None:
    print(f"{machine.describe()}\n")
    print(f"{PREFIX_TOKENS} tokens in common, time to the first token; medians of {len(prefix['ratios'])}")
    print(f"first   {statistics.median(prefix['first_ms']):>8.1f} ms")
    print(f"second  {statistics.median(prefix['second_ms']):>8.1f} ms")
    shown = ", ".join(f"{ratio:.3f}" for ratio in prefix["ratios"])
    print(f"second / first: {prefix['ratio']:.3f}  (rounds: {shown})\n")
    print(
        f"{memory['requests']} requests of {QUEUED_PROMPT_TOKENS} + {QUEUED_NEW_TOKENS} tokens at once, "
        f"up to {memory['most_queued']} queued; MiB of resident memory"
    )
    for name, key in (
        ("after imports", "imports_bytes"),
        ("+ weights in bf16", "weights_bytes"),
        ("+ KV budget", "kv_bytes"),
        ("= accounted for", "accounted_bytes"),
        ("peak while loading", "load_peak_bytes"),
        ("once loaded", "loaded_bytes"),
        ("peak, one batch", "batch_peak_bytes"),
        ("peak, with a queue", "queue_peak_bytes"),
    ):
        print(f"{name:20}{memory[key] / _MIB:>10.0f}")
    print(f"peak / accounted for: {memory['peak_to_accounted']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="does it run? two rounds, 40 requests")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=("prefix", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        line = Line()
        part = shared_prefix if options.part == "prefix" else queue_memory
        line.send(asyncio.run(part(options.size)))
        return
    prefix = in_a_process("prefix", 2 if options.quick else options.rounds)
    memory = in_a_process("memory", 40 if options.quick else QUEUED)
    report(prefix, memory)
    if options.json:
        whole = {"machine": machine.describe(), "versions": machine.versions(), "prefix": prefix}
        options.json.write_text(json.dumps(whole | {"memory": memory}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
