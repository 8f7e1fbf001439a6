"""Whether a runner gives the logits that the stock model gives, asked of both when the model is loaded."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from blaze.engines.llm.kv_cache import UNIT
from blaze.engines.llm.runner import Runner
from blaze.engines.llm.scheduler import Step, Work
from blaze.engines.llm.sequence import Sequence
from blaze.engines.llm.slots import Slot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_TOKENS = 24
# Of the logits' own spread. Rounding alone gives about 2e-6 in fp32 and 0.06 in bf16; a wrong position,
# mask or weight gives several times the tolerance.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}
_QUANTIZED = 0.3


@dataclass(frozen=True, slots=True)
class Probe:
    token_ids: tuple[tuple[int, ...], ...]  # two prompts
    logits: tuple[torch.Tensor, ...]  # float32 [tokens, vocabulary], by the stock model, without a cache

    @classmethod
    @torch.inference_mode()
    def of(cls, model: PreTrainedModel, vocabulary_size: int, max_model_len: int) -> Probe:
        length = min(_TOKENS, max_model_len - 1)
        generator = torch.Generator().manual_seed(0)
        prompts = tuple(
            tuple(torch.randint(vocabulary_size, (length - less,), generator=generator).tolist())
            for less in (0, length // 3)
        )
        logits = tuple(
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().cpu()
            for ids in prompts
        )
        return cls(prompts, logits)

    def agrees(self, runner: Runner, *, exact: bool) -> bool:
        """Prompts in chunks, then single tokens, of both sequences together: what serving does."""
        sequences = [
            Sequence(ids, (0.0, 0, at), needs_all_logits=True) for at, ids in enumerate(self.token_ids)
        ]
        for at, sequence in enumerate(sequences):
            sequence.slot = Slot(at * UNIT, UNIT)
        if runner.store.tokens < 2 * UNIT:
            sequences = sequences[:1]
        found: list[list[torch.Tensor]] = [[] for _ in sequences]
        while any(sequence.num_pending for sequence in sequences):
            work = tuple(
                Work(sequence, sequence.num_computed, _count(sequence))
                for sequence in sequences
                if sequence.num_pending
            )
            for item, logits in runner.execute(Step((), work)).all_logits:
                found[item.sequence.rank[2]].append(logits.float().cpu())
            for item in work:
                item.sequence.num_computed = item.end
        worst = max(
            _difference(torch.cat(rows), expected) for rows, expected in zip(found, self.logits, strict=False)
        )
        allowed = _TOLERANCE[runner.store.dtype] if exact else _QUANTIZED
        logger.info(
            "%s runner: logits differ from the stock model's by %.2g (allowed %g)",
            runner.name,
            worst,
            allowed,
        )
        return worst <= allowed  # False for what is not a number


def _count(sequence: Sequence) -> int:
    """Two chunks of a third each, then token by token."""
    third = len(sequence.token_ids) // 3
    return third if sequence.num_computed < 2 * third else 1


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to the spread of the logits; infinite when not finite."""
    value = float((found - expected).pow(2).mean().sqrt() / expected.std())
    return value if math.isfinite(value) else math.inf
