"""Runs :mod:`benchmarks.fidelity` in a process of its own, and prints what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def run(tokens: int | None) -> dict[str, Any]:
    limit = [] if tokens is None else ["--tokens", str(tokens)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fidelity", *limit], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"benchmarks.fidelity failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def show(found: dict[str, Any]) -> None:
    print(
        f"\nPrecision, on {found['tokens']} tokens of English: KL(fp32 stock || x), mean per token, in nats\n"
        f"{'':14}{'as a prompt':>14}{'token by token':>16}{'perplexity':>12}"
    )
    print(f"{'stock fp32':14}{'':>14}{'':>16}{found['fp32_perplexity']:>12.3f}")
    for name, row in found["rows"].items():
        print(f"{name:14}{row['kl_prompt']:>14.3g}{row['kl_decode']:>16.3g}{row['perplexity']:>12.3f}")
    ratio = found["kl_fused_to_stock"]
    print(f"KL fused / stock, bf16: {ratio['kl_prompt']:.2f} and {ratio['kl_decode']:.2f}")
    print(f"int8's perplexity against bf16's: {found['int8_perplexity_change']:+.2%}")
