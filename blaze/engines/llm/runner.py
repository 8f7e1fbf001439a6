"""What the engine asks of whatever runs the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from blaze.engines.llm.greedy import Largest
from blaze.engines.llm.kv_store import KVStore
from blaze.engines.llm.scheduler import Step, Work


@dataclass(frozen=True, slots=True)
class StepResult:
    """Logits of the step's work: of the token after it, and of all its tokens where those were asked for."""

    next_logits: torch.Tensor  # [work that yields a token, vocabulary], in the step's order
    all_logits: tuple[tuple[Work, torch.Tensor], ...]  # [count, vocabulary] each
    largest: Largest | None = None  # of each row of ``next_logits``, where the runner knows them


class Runner(Protocol):
    """Carries out steps, one after another."""

    @property
    def name(self) -> str: ...

    @property
    def store(self) -> KVStore: ...

    @property
    def batches_neighbours(self) -> bool:
        """Whether it is faster where running sequences lie side by side."""
        ...

    def settle(self) -> None:
        """The thread that calls this carries out all further steps."""
        ...

    def execute(self, step: Step, launching: Callable[[], None] = lambda: None) -> StepResult:
        """Copies first, then the work; raises whatever the model raises.

        ``launching`` is called when the interpreter has little left to do for this step: whatever needs it
        gets it then, and not while it prepares the step.
        """
        ...


def wants_all_logits(work: Work) -> bool:
    """Of a prompt, also the logits in its midst, for log probabilities of the prompt itself."""
    return work.sequence.needs_all_logits and work.start < work.sequence.prompt_len
