"""Compiled steps are as near to the model in float32 as the stock model in bfloat16 is, and not further."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from blaze.config import cache_dir
from blaze.engine_config import LLMConfig
from blaze.engines.llm.fused_step import StepRunner
from blaze.engines.llm.loading import load
from blaze.engines.llm.native.build import library
from blaze.engines.llm.native.kernels import items_overtaken
from blaze.engines.llm.scheduler import Step, Work
from blaze.engines.llm.sequence import Sequence
from blaze.engines.llm.slots import Slot
from blaze.models.sources import FolderSource
from tests.golden.llm import runs_steps
from tests.golden.tiny_models import BYTES, CONTEXT, FUSED, save

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(not runs_steps(), reason="this machine serves bfloat16 in another way"),
]

# Nothing of it is a multiple of 64 outputs, nor the same for gate and up as for the hidden state.
ODD: tuple[str, dict[str, Any]] = (
    "Qwen2",
    {
        "vocab_size": 263,
        "hidden_size": 80,
        "intermediate_size": 106,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
    },
)
BIASED: tuple[str, dict[str, Any]] = (
    "Llama",
    ODD[1] | {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True},
)
CASES = FUSED | {"odd": ODD, "biased": BIASED}
LENGTHS = (1, 7, 40, 130)


def _load(folder: Path, **options: Any) -> StepRunner:
    config = LLMConfig(
        **{"dtype": "bfloat16", "runner": "fused", "max_model_len": CONTEXT, "kv_cache_memory": 2**24}
        | options
    )
    runner = load(FolderSource(folder), config, 2, cache_dir()).runner
    assert isinstance(runner, StepRunner)
    return runner


def _prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(BYTES) for _ in range(length)] for length in LENGTHS]


def _logits(runner: StepRunner, prompts: list[list[int]], chunk: int) -> list[torch.Tensor]:
    """All of them together, each in chunks: float32 [tokens, vocabulary] of each prompt."""
    sequences = [Sequence(ids, (0.0, at, 0), needs_all_logits=True) for at, ids in enumerate(prompts)]
    for at, sequence in enumerate(sequences):
        sequence.slot = Slot(at * CONTEXT, CONTEXT)
    found: dict[Sequence, list[torch.Tensor]] = {sequence: [] for sequence in sequences}
    while pending := [sequence for sequence in sequences if sequence.num_pending]:
        work = [Work(s, s.num_computed, min(chunk, s.num_pending)) for s in pending]
        for item, logits in runner.execute(Step((), tuple(work))).all_logits:
            found[item.sequence].append(logits.float().clone())
        for item in work:
            item.sequence.num_computed = item.end
    return [torch.cat(rows) for rows in found.values()]


def _saved(folder: Path, name: str) -> PreTrainedModel:
    """In float32, with the very weights that bfloat16 leaves: the answers that are right."""
    model = save(folder, CASES[name])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


@torch.inference_mode()
def _stock(model: PreTrainedModel) -> list[torch.Tensor]:
    return [model(torch.tensor([ids])).logits[0].float() for ids in _prompts()]


def _in_bfloat16(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    # Not by ``model.to``, which rounds the rotary frequencies too.
    model.save_pretrained(folder / "stock")
    return AutoModelForCausalLM.from_pretrained(folder / "stock", dtype=torch.bfloat16).eval()


def _error(found: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Root mean square over all logits, relative to their spread."""
    found_all, right_all = torch.cat(found), torch.cat(right)
    return float((found_all - right_all).pow(2).mean().sqrt() / right_all.std())


@pytest.mark.parametrize("name", CASES)
def test_steps_compute_the_model(name: str, tmp_path: Path) -> None:
    model = _saved(tmp_path, name)
    right, stock = _stock(model), _stock(_in_bfloat16(model, tmp_path))
    error = _error(_logits(_load(tmp_path), _prompts(), chunk=50), right)
    assert error <= 1.1 * _error(stock, right)


@pytest.mark.parametrize("name", ["llama", "odd", "biased"])
def test_int8_steps_compute_the_rounded_weights(name: str, tmp_path: Path) -> None:
    model = _saved(tmp_path, name)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach()
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            module.weight = torch.nn.Parameter((weight / scale).round() * scale)
    right, stock = _stock(model), _stock(_in_bfloat16(model, tmp_path))
    error = _error(_logits(_load(tmp_path, quantization="int8"), _prompts(), chunk=50), right)
    assert error <= 1.1 * _error(stock, right)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("name", ["odd", "qwen3", "mistral-window"])
def test_a_row_has_the_same_bits_in_any_company(name: str, quantization: str, tmp_path: Path) -> None:
    save(tmp_path, CASES[name])
    runner = _load(tmp_path, quantization=quantization)
    together = _logits(runner, _prompts(), chunk=CONTEXT)
    for chunk in (1, 3, 64):
        assert all(map(torch.equal, _logits(runner, _prompts(), chunk), together))
    alone = [_logits(runner, [prompt], chunk=33)[0] for prompt in _prompts()]
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_matter(threads: int, tmp_path: Path) -> None:
    save(tmp_path, CASES["llama"])
    runner = _load(tmp_path)
    two = _logits(runner, _prompts(), chunk=20)
    runner._threads = threads
    assert all(map(torch.equal, _logits(runner, _prompts(), chunk=20), two))


def test_items_that_are_taken_over_have_the_same_bits(tmp_path: Path) -> None:
    """More threads than cores: some lose theirs in the middle of an item, and others are done first."""
    save(tmp_path, CASES["llama"])
    runner = _load(tmp_path)
    right = _logits(runner, _prompts(), chunk=20)
    built = library(cache_dir())
    assert built is not None
    before = items_overtaken(built)
    runner._threads = 4 * (os.cpu_count() or 1)
    for _ in range(300):
        assert all(map(torch.equal, _logits(runner, _prompts(), chunk=20), right))
        if items_overtaken(built) - before >= 10:
            return
    pytest.fail(f"only {items_overtaken(built) - before} items were taken over")


def test_a_sequence_whose_numbers_are_none_leaves_the_others_alone(tmp_path: Path) -> None:
    save(tmp_path, CASES["llama"])
    runner = _load(tmp_path)
    right = _logits(runner, _prompts(), chunk=CONTEXT)
    runner.store.rows(0)[1][: CONTEXT * 4].fill_(float("nan"))  # the values of the first slot
    found = _logits(runner, _prompts(), chunk=1)
    assert all(map(torch.equal, found[1:], right[1:]))
