"""What the fused path costs in precision, on a fixed text; a process of its own.

KL(fp32 stock || x), the mean over the text's tokens, for the stock model in bf16 and for Blaze's fused path
in bf16 and in int8; the text taken as a prompt, and again token by token, as answers come about. And the
perplexity of the text. Prints one line of JSON. Run: `python -m benchmarks.fidelity [--tokens N]`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from transformers import AutoModelForCausalLM

from benchmarks.smollm2 import SOURCE, folder, text_ids
from benchmarks.worker import Line
from blaze.config import cache_dir
from blaze.engine_config import LLMConfig
from blaze.engines.llm.loading import load
from blaze.engines.llm.scheduler import Step, Work
from blaze.engines.llm.sequence import Sequence
from blaze.engines.llm.slots import Slot
from blaze.models.sources import parse_source

PROMPT_CHUNK = LLMConfig().max_batch_tokens
Forward: TypeAlias = Callable[[list[int], int], torch.Tensor]  # ids, tokens at once -> float32 logits


def stock(dtype: torch.dtype) -> Forward:
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=dtype).eval()

    def forward(ids: list[int], chunk: int) -> torch.Tensor:
        cache, rows = None, []
        for start in range(0, len(ids), chunk):
            output = model(torch.tensor([ids[start : start + chunk]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0].float())
        return torch.cat(rows)

    return forward


def fused(quantization: str) -> Forward:
    options = LLMConfig.model_validate(
        {
            "dtype": "bfloat16",
            "device": "cpu",
            "runner": "fused",
            "quantization": quantization,
            "max_model_len": 2048,
            "kv_cache_memory": 2**28,
        }
    )
    served = load(parse_source(SOURCE), options, os.cpu_count() or 1, cache_dir())

    def forward(ids: list[int], chunk: int) -> torch.Tensor:
        sequence = Sequence(ids, (0.0, 0, 0), needs_all_logits=True)
        sequence.slot = Slot(0, 2048)
        rows = []
        while sequence.num_pending:
            count = min(chunk, sequence.num_pending)
            result = served.runner.execute(Step((), (Work(sequence, sequence.num_computed, count),)))
            rows += [logits.float() for _, logits in result.all_logits]
            sequence.num_computed += count
        return torch.cat(rows)

    return forward


def kl(reference: torch.Tensor, found: torch.Tensor) -> float:
    """KL(reference || found) in nats, mean over the rows."""
    log_p, log_q = reference.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def perplexity(logits: torch.Tensor, ids: list[int]) -> float:
    loss = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]))
    return float(loss.exp())


@torch.inference_mode()
def measure(ids: list[int]) -> dict[str, Any]:
    reference = stock(torch.float32)(ids, PROMPT_CHUNK)
    makers: dict[str, Callable[[], Forward]] = {
        "stock bf16": lambda: stock(torch.bfloat16),
        "fused bf16": lambda: fused("none"),
        "fused int8": lambda: fused("int8"),
    }
    rows: dict[str, dict[str, float]] = {}
    for name, make in makers.items():
        forward = make()
        as_prompt, by_token = forward(ids, PROMPT_CHUNK), forward(ids, 1)
        rows[name] = {
            "kl_prompt": kl(reference, as_prompt),
            "kl_decode": kl(reference, by_token),
            "perplexity": perplexity(as_prompt, ids),
        }
    return {
        "tokens": len(ids),
        "fp32_perplexity": perplexity(reference, ids),
        "rows": rows,
        "kl_fused_to_stock": {
            key: rows["fused bf16"][key] / rows["stock bf16"][key] for key in ("kl_prompt", "kl_decode")
        },
        "int8_perplexity_change": rows["fused int8"]["perplexity"] / rows["fused bf16"]["perplexity"] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, help="of the text's beginning; the default is all of it")
    options = parser.parse_args()
    line = Line()
    torch.set_num_threads(os.cpu_count() or 1)
    line.send(measure(text_ids()[: options.tokens]))


if __name__ == "__main__":
    main()
