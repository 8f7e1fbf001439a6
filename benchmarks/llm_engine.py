"""How fast is Blaze's LLM engine? Output tokens per second at batch 1, 8 and 32, in one run, against

vLLM for CPUs as it comes and tuned as its documentation says, transformers' `generate` with static batches,
and transformers' continuous batching; all in bf16. Blaze's int8 runs beside them. SmolLM2-135M, distinct
prompts of 32 tokens, greedy, answers of a fixed length; the time of a turn is that of its whole batch,
prompts included. Each contestant has a process of its own, all are loaded at once and measured in turns, so
that a machine that speeds up or slows down does so for all; who is not measured waits for its next line.
Then the precision of the fused path (see :mod:`benchmarks.fidelity`).

Run: `python -m benchmarks.llm_engine [--rounds 5] [--tokens 128] [--without NAME ...] [--json PATH]`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import fidelity_report, machine
from benchmarks.contestants import Contestant
from benchmarks.rivals import vllm_cpu
from benchmarks.smollm2 import folder, random_ids

BATCHES = (1, 8, 32)
PROMPT_TOKENS = 32
KV_GIB = 1  # for everybody's keys and values
SETTLE_S = 0.5  # threads of the turn before go to sleep
NOISY_CORES = 0.1  # used by others during a turn
BLAZE, INT8 = "Blaze bf16", "Blaze int8"
VLLM = ("vLLM default", "vLLM tuned")
STATIC, CONTINUOUS = "transformers static", "transformers continuous"
NAMES = (BLAZE, INT8, *VLLM, STATIC, CONTINUOUS)
SHORT = {"vllm": VLLM, "static": (STATIC,), "continuous": (CONTINUOUS,), "int8": (INT8,)}


@dataclass(frozen=True)
class Turn:
    seconds: float
    tokens: int
    own_cores: float
    other_cores: float

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds


Results: TypeAlias = dict[str, dict[int, list[Turn]]]


def contestants(names: list[str], venv: Path | None, logs: Path) -> list[Contestant]:
    python, model, kv_bytes = sys.executable, str(folder()), KV_GIB * 2**30
    blaze = {
        "dtype": "bfloat16",
        "device": "cpu",
        "max_batch_size": max(BATCHES),
        "kv_cache_memory": kv_bytes,
        "prefix_caching": False,
    }
    commands: dict[str, list[str]] = {
        BLAZE: [python, "-m", "benchmarks.blaze_engine", json.dumps(blaze)],
        INT8: [python, "-m", "benchmarks.blaze_engine", json.dumps(blaze | {"quantization": "int8"})],
        STATIC: [python, "-m", "benchmarks.rivals.transformers_generate", model],
        CONTINUOUS: [
            python,
            "-m",
            "benchmarks.rivals.transformers_continuous",
            model,
            str(max(BATCHES)),
            str(kv_bytes),
        ],
    }
    environments: dict[str, dict[str, str]] = {}
    if venv is not None:
        vllm = [str(venv / "bin" / "python"), "-m", "benchmarks.rivals.vllm_offline", model]
        commands |= dict.fromkeys(VLLM, vllm)
        environments[VLLM[0]] = vllm_cpu.environment(venv, "default", kv_gib=KV_GIB)
        environments[VLLM[1]] = vllm_cpu.environment(venv, "tuned", kv_gib=KV_GIB)
    return [
        Contestant(name, commands[name], logs / f"{name.replace(' ', '-')}.log", environments.get(name))
        for name in names
    ]


def turn(contestant: Contestant, prompts: list[list[int]], tokens: int) -> Turn:
    contestant.wakes()
    time.sleep(SETTLE_S)
    with machine.CpuUse(contestant.processes()) as use:
        answer = contestant.ask({"prompts": prompts, "tokens": tokens})
    contestant.rests()
    if answer["tokens"] != len(prompts) * tokens:
        raise RuntimeError(f"{contestant.name} gave {answer['tokens']} tokens, not {len(prompts) * tokens}")
    return Turn(answer["seconds"], answer["tokens"], use.own, use.others)


def measure(present: list[Contestant], rounds: int, tokens: int) -> Results:
    results: Results = {c.name: {batch: [] for batch in BATCHES} for c in present}
    draw = random.Random(0)
    for number in range(-1, rounds):  # one before the first, shorter, that is not counted
        for batch in BATCHES:
            prompts = [random_ids(draw, PROMPT_TOKENS) for _ in range(batch)]  # the same for all
            first = max(number, 0) % len(present)
            for contestant in present[first:] + present[:first]:
                if number < 0:
                    turn(contestant, prompts, min(tokens, 32))
                    continue
                got = turn(contestant, prompts, tokens)
                results[contestant.name][batch].append(got)
                print(
                    f"round {number + 1}, batch {batch}: {contestant.name} {got.per_second:.1f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
    return results


def ratios(results: Results, ours: str, rival: str, batch: int) -> list[float]:
    pairs = zip(results[ours][batch], results[rival][batch], strict=True)
    return [mine.per_second / theirs.per_second for mine, theirs in pairs]


def median_of(turns: list[Turn]) -> float:
    return statistics.median(turn.per_second for turn in turns)


def stronger_vllm(results: Results, batch: int) -> str | None:
    """Of vLLM's two setups, the one that is faster at this batch: the rival that counts."""
    present = [name for name in VLLM if name in results]
    return max(present, key=lambda name: median_of(results[name][batch]), default=None)


def report(results: Results, present: list[Contestant], tokens: int) -> None:
    rounds = len(results[present[0].name][BATCHES[0]])
    print(f"output tokens/s, {PROMPT_TOKENS} prompt and {tokens} new tokens each; medians of {rounds} rounds")
    print(f"{'':26}" + "".join(f"{f'batch {batch}':>10}" for batch in BATCHES) + f"{'idle cores':>12}")
    for contestant in present:
        medians = "".join(f"{median_of(results[contestant.name][batch]):>10.1f}" for batch in BATCHES)
        print(f"{contestant.name:26}{medians}{max(contestant.idle_cores, default=0.0):>12.3f}")
    print("\nrounds")
    for name, by_batch in results.items():
        for batch, turns in by_batch.items():
            shown = "  ".join(f"{turn.per_second:.1f}{'*' * is_noisy(turn)}" for turn in turns)
            print(f"{name:26}{f'batch {batch}':>10}  {shown}")
    if any(is_noisy(turn) for by_batch in results.values() for turns in by_batch.values() for turn in turns):
        print(f"* others used more than {NOISY_CORES} cores meanwhile: not a quiet machine")
    report_ratios(results)


def is_noisy(turn: Turn) -> bool:
    return turn.other_cores > NOISY_CORES


def report_ratios(results: Results) -> None:
    print("\nratios, medians of the rounds' own (rounds)")
    for ours in (name for name in (BLAZE, INT8) if name in results):
        for rival in (name for name in results if name not in (ours, INT8)):
            for batch in BATCHES:
                found = ratios(results, ours, rival, batch)
                counts = ours == BLAZE and rival == stronger_vllm(results, batch)
                shown = ", ".join(f"{ratio:.2f}" for ratio in found)
                mark = "  <- vLLM at its best" if counts else ""
                what = f"{ours} / {rival}"
                print(f"{what:38}{f'batch {batch}':>9}{statistics.median(found):>7.2f}  ({shown}){mark}")


def as_json(results: Results, present: list[Contestant]) -> dict[str, Any]:
    rivals = [name for name in results if name != BLAZE]
    return {
        "turns": {
            name: {
                batch: [vars(turn) | {"tokens_per_s": turn.per_second} for turn in turns]
                for batch, turns in by_batch.items()
            }
            for name, by_batch in results.items()
        },
        "idle_cores": {c.name: c.idle_cores for c in present},
        "blaze_to_rival": {
            rival: {batch: statistics.median(ratios(results, BLAZE, rival, batch)) for batch in BATCHES}
            for rival in rivals
        },
        "stronger_vllm": {batch: stronger_vllm(results, batch) for batch in BATCHES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--quick", action="store_true", help="does it run? one round, few tokens")
    parser.add_argument("--without", choices=SHORT, nargs="*", default=[], help="leave these out")
    parser.add_argument("--vllm-venv", type=Path, help="where vLLM is (or: BLAZE_VLLM_VENV)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds, tokens = (1, 16) if options.quick else (options.rounds, options.tokens)
    left_out = {name for short in options.without for name in SHORT[short]}
    names = [name for name in NAMES if name not in left_out]
    venv = None if left_out.issuperset(VLLM) else vllm_cpu.venv_from(options.vllm_venv)

    versions, notes = machine.versions(), dict[str, str]()
    with tempfile.TemporaryDirectory(prefix="blaze-benchmark-") as logs, ExitStack() as running:
        present = []
        for contestant in contestants(names, venv, Path(logs)):
            present.append(running.enter_context(contestant))
            hello = contestant.hear()  # one after another: loading is work too
            contestant.rests()
            versions |= hello.get("versions", {})
            notes |= {contestant.name: hello["note"]} if "note" in hello else {}
        results = measure(present, rounds, tokens)
    precision = fidelity_report.run(tokens=48 if options.quick else None)

    print(machine.describe())
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for name, note in notes.items():
        print(f"{name}: {note}")
    report(results, present, tokens)
    fidelity_report.show(precision)
    if options.json:
        whole = {
            "machine": machine.describe(),
            "versions": versions,
            "notes": notes,
            "rounds": rounds,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": tokens,
            "kv_gib": KV_GIB,
            **as_json(results, present),
            "precision": precision,
        }
        options.json.write_text(json.dumps(whole, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
