"""How fast is Blaze's diffusion engine? In one run, on the same requests, against diffusers

one request after another, and a server that batches whole requests of equal parameters. fp32, 20 steps
where nothing else is said, each contestant with one math thread and with one per core: the faster one counts.

- mixed: 64 requests, all step counts from 8 to 40 and three guidances, Poisson arrivals about as fast as
  Blaze can serve them.
- alike: 32 requests at once, the same but for prompt and seed; for diffusers, one call with 32 prompts.
- alone: one request, five times.

First with `digits`, whose denoiser is so small that all of a pipeline counts; with ``--large`` also with a
random UNet of 50 million parameters at 64 x 64 latents, where nothing but the denoiser does, and batches
save little on a CPU.

Run: `python -m benchmarks.diffusion [--rounds 3] [--large] [--json PATH]`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from benchmarks import machine
from benchmarks.contestants import Contestant
from benchmarks.image_workload import Served, Wanted, alike, command, mixed
from blaze.models.sources import package_path

BLAZE, ONE, ALIKE = "Blaze", "one after another", "whole, alike"
MODULES = {
    BLAZE: ("benchmarks.blaze_images", 16),
    ONE: ("benchmarks.rivals.diffusers_whole", 1),
    ALIKE: ("benchmarks.rivals.diffusers_whole", 32),
}
LOAD = 1.2  # of what Blaze serves when all come at once: less than it can, for the last ones are few
SETTLE_S = 0.5  # threads of the turn before go to sleep
NOISY_CORES = 0.1  # used by others during a turn


@dataclass(frozen=True)
class Turn:
    served: Served
    other_cores: float


@dataclass(frozen=True)
class Sizes:
    """How much there is to do with a model."""

    mixed: int
    steps: range
    alike: int
    usual_steps: int = 20


SMALL = Sizes(mixed=64, steps=range(8, 41), alike=32)
LARGE = Sizes(mixed=9, steps=range(3, 12), alike=4, usual_steps=5)
QUICK = Sizes(mixed=6, steps=range(2, 5), alike=4, usual_steps=3)

TIMES = {"mixed": 1, "alike": 1, "alone": 5}  # in a round

Results: TypeAlias = dict[str, dict[str, list[Turn]]]  # contestant -> workload -> rounds


def contestants(folder: Path, threads: list[int], logs: Path) -> list[Contestant]:
    return [
        Contestant(
            f"{name}, {count} threads",
            [sys.executable, "-m", module, str(folder), str(count), str(most)],
            logs / f"{name}-{count}.log".replace(" ", "-"),
        )
        for name, (module, most) in MODULES.items()
        for count in threads
    ]


def turn(contestant: Contestant, requests: list[Wanted]) -> Turn:
    contestant.wakes()
    time.sleep(SETTLE_S)
    with machine.CpuUse(contestant.processes()) as use:
        answer = contestant.ask(command(requests))
    contestant.rests()
    return Turn(Served(**answer), use.others)


def together(turns: list[Turn]) -> Turn:
    latencies = [latency for each in turns for latency in each.served.latencies_s]
    seconds = sum(each.served.seconds for each in turns)
    return Turn(Served(latencies, seconds), max(each.other_cores for each in turns))


def measure(present: list[Contestant], sizes: Sizes, rounds: int) -> Results:
    results: Results = {contestant.name: {} for contestant in present}
    for contestant in present:
        turn(contestant, alike(2, 2, seed=0))  # the first one of all is slower
    rate = calibrate([c for c in present if c.name.startswith(BLAZE)], sizes)
    for number in range(rounds):
        workloads = {
            "mixed": mixed(sizes.mixed, sizes.steps, rate, seed=number),
            "alike": alike(sizes.alike, sizes.usual_steps, seed=number),
            "alone": alike(1, sizes.usual_steps, seed=number),
        }
        for workload, requests in workloads.items():
            first = number % len(present)
            for contestant in present[first:] + present[:first]:
                got = together([turn(contestant, requests) for _ in range(TIMES[workload])])
                results[contestant.name].setdefault(workload, []).append(got)
                print(
                    f"round {number + 1}, {workload}: {contestant.name} {got.served.per_second:.2f} images/s,"
                    f" mean latency {got.served.mean_s:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
    return results


def calibrate(ours: list[Contestant], sizes: Sizes) -> float:
    """Requests per second, about as many as Blaze can serve."""
    at_once = mixed(sizes.mixed, sizes.steps, 1e6, seed=-1)
    return LOAD * max(turn(contestant, at_once).served.per_second for contestant in ours)


def best(results: Results, name: str, workload: str) -> str:
    """The contestant's number of threads that is the faster one."""
    found = [each for each in results if each.startswith(name)]
    return max(
        found, key=lambda each: statistics.median(t.served.per_second for t in results[each][workload])
    )


def report(results: Results) -> None:
    for workload in ("mixed", "alike", "alone"):
        print(f"\n{workload:28}{'images/s':>10}{'mean s':>9}   images/s of the rounds")
        for name, by_workload in results.items():
            turns = by_workload[workload]
            median = statistics.median(each.served.per_second for each in turns)
            mean = statistics.median(each.served.mean_s for each in turns)
            rounds = "  ".join(
                f"{each.served.per_second:.2f}{'*' * (each.other_cores > NOISY_CORES)}" for each in turns
            )
            print(f"{name:28}{median:>10.2f}{mean:>9.2f}   {rounds}")
        ours = best(results, BLAZE, workload)
        for rival in (ONE, ALIKE):
            theirs = best(results, rival, workload)
            pairs = list(zip(results[ours][workload], results[theirs][workload], strict=True))
            rate = statistics.median(a.served.per_second / b.served.per_second for a, b in pairs)
            latency = statistics.median(a.served.mean_s / b.served.mean_s for a, b in pairs)
            print(f"{ours} / {theirs}: {rate:.2f} of the images/s, {latency:.2f} of the mean latency")
    print(f"\n* others used more than {NOISY_CORES} cores meanwhile: not a quiet machine")


def run(folder: Path, sizes: Sizes, threads: list[int], rounds: int) -> Results:
    with tempfile.TemporaryDirectory(prefix="blaze-benchmark-") as logs, ExitStack() as running:
        present = []
        for contestant in contestants(folder, threads, Path(logs)):
            present.append(running.enter_context(contestant))
            contestant.hear()  # one after another: loading is work too
            contestant.rests()
        return measure(present, sizes, rounds)


def write_large(folder: Path) -> Path:
    """`digits` with a random UNet of 50 million parameters, for images of 128 x 128 pixels."""
    import torch
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    pipeline = DiffusionPipeline.from_pretrained(package_path("blaze/assets/digits"), use_safetensors=True)
    torch.manual_seed(0)
    changes = {"sample_size": 64, "block_out_channels": (128, 256, 384, 384)}
    blocks = {
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
    }
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, **changes, **blocks)
    millions = sum(parameter.numel() for parameter in pipeline.unet.parameters()) / 1e6
    print(f"a UNet of {millions:.0f} million parameters", file=sys.stderr)
    pipeline.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="the large UNet too")
    parser.add_argument("--quick", action="store_true", help="does it run? one round, few steps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    rounds = 1 if options.quick else options.rounds
    sizes = QUICK if options.quick else SMALL
    found = {"digits": run(package_path("blaze/assets/digits"), sizes, sorted({1, cores}), rounds)}
    if options.large:
        with tempfile.TemporaryDirectory(prefix="blaze-large-") as folder:
            sizes = QUICK if options.quick else LARGE
            found["large"] = run(write_large(Path(folder)), sizes, [cores], rounds)
    print(machine.describe())
    print(", ".join(f"{name} {version}" for name, version in machine.versions().items()))
    for model, results in found.items():
        print(f"\n=== {model} ===")
        report(results)
    if options.json:
        whole = {
            "machine": machine.describe(),
            "versions": machine.versions(),
            "results": {
                model: {
                    name: {workload: [asdict(each) for each in turns] for workload, turns in by.items()}
                    for name, by in results.items()
                }
                for model, results in found.items()
            },
        }
        options.json.write_text(json.dumps(whole, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
