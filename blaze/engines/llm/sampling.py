"""Drawing tokens: every draw is a function of (seed, choice, position), never of the batch around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blaze.types import SamplingParams

_MASK = (1 << 64) - 1


def uniform(seed: int, choice: int, position: int) -> float:
    """The one uniform number in [0, 1) behind token ``position`` of choice ``choice``.

    A counter-based generator: the SplitMix64 finalizer (Steele, Lea & Flood, "Fast Splittable
    Pseudorandom Number Generators", OOPSLA 2014) over the three counters, so that a retried, resumed or
    re-batched request repeats the same draws without any state.
    """
    state = _mix(seed & _MASK)
    state = _mix(state ^ _mix(choice + 0x9E3779B97F4A7C15))
    state = _mix(state ^ _mix(position + 0xD1B54A32D192ED03))
    return (state >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """One token id per row of ``logits`` [rows, vocabulary]; ``draws`` are the rows' uniform numbers.

    Temperature 0 is the arg max. Otherwise, in float64: softmax of logits / temperature over the
    ``top_k`` likeliest, cut to the smallest set whose mass reaches ``top_p`` of theirs (the order of
    transformers' own warpers), and the inverse of the cumulative distribution, likeliest first, at the
    draw.
    """
    chosen = logits.argmax(dim=-1)
    hot = [row for row, p in enumerate(params) if p.temperature > 0]
    if hot:
        index = torch.tensor(hot, device=logits.device)
        chosen[index] = _inverse_cdf(
            logits[index].float(), [params[row] for row in hot], [draws[row] for row in hot]
        )
    return [int(token) for token in chosen.tolist()]


def _inverse_cdf(
    logits: torch.Tensor, params: Sequence[SamplingParams], draws: Sequence[float]
) -> torch.Tensor:
    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device, dtype=torch.float64).unsqueeze(1)

    size = logits.shape[-1]
    # The largest logit is taken off first: divided by a tiny temperature it would be infinite.
    relative = logits.double() - logits.double().amax(dim=-1, keepdim=True)
    probabilities = torch.softmax(relative / column([p.temperature for p in params]), dim=-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(size, device=logits.device).unsqueeze(0)
    keep = rank < column([p.top_k or size for p in params])
    ordered = ordered * keep
    ordered /= ordered.sum(dim=-1, keepdim=True)
    before = ordered.cumsum(dim=-1) - ordered  # mass of everything likelier
    keep &= before < column([p.top_p for p in params])
    keep[:, 0] = True
    mass = (ordered * keep).cumsum(dim=-1)
    target = column(draws) * mass[:, -1:]
    position = (mass <= target).sum(dim=-1, keepdim=True).clamp(max=size - 1)
    # Rounding at the upper edge must not step out of the kept set.
    position = torch.minimum(position, keep.sum(dim=-1, keepdim=True) - 1)
    return ids.gather(-1, position).squeeze(-1)
