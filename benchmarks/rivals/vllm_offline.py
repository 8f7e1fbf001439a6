"""vLLM's LLM class as a worker. Runs with the Python of vLLM's own virtual environment."""

from __future__ import annotations

import sys
import time
from importlib.metadata import version

from benchmarks.worker import Line


def main(model: str) -> None:
    line = Line()
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(model=model, dtype="bfloat16", enable_prefix_caching=False, disable_log_stats=True, seed=0)
    line.send({"versions": {"vllm": version("vllm"), "vllm's torch": version("torch")}})
    for command in line.commands():
        count = command["tokens"]
        sampling = SamplingParams(temperature=0.0, max_tokens=count, min_tokens=count, ignore_eos=True)
        prompts = [{"prompt_token_ids": ids} for ids in command["prompts"]]
        started = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        line.send({"seconds": seconds, "tokens": sum(len(o.outputs[0].token_ids) for o in outputs)})


if __name__ == "__main__":  # vLLM starts its processes by importing this module again
    main(sys.argv[1])
