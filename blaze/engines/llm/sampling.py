"""Drawing tokens: every draw is a function of (seed, choice, position) and its row, never of the batch.

On CPU a row's result has the same bits alone, in any batch and with any number of threads. That excludes
``sum`` and ``logsumexp`` over whole rows, which torch splits among threads when there is a single row; what
is used here (``max``, ``softmax``, sums over short blocks, ``cumsum``) works within each row in fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from blaze.engines.llm.greedy import Largest, finite, greedy
from blaze.engines.llm.penalties import (
    SamplingRow,
    TokenHistory,
    apply_penalties,
    column,
    leaves_logits_alone,
    needs_history,
    select,
)
from blaze.errors import NonFiniteOutput
from blaze.sampling_params import SamplingParams

__all__ = [
    "SampledToken",
    "SamplingRow",
    "TokenHistory",
    "needs_history",
    "sample",
    "token_logprobs",
    "uniform",
]

_MASK = (1 << 64) - 1
_BLOCK = 128  # ids whose probabilities are summed before they are searched
_CANDIDATES = 256  # of the likeliest tokens; the mass of most rows' nucleus is among them
_LEAST_TEMPERATURE = 1e-30  # float32 has no 1e-300; at this one, neighbouring logits are infinitely far apart
_NOT_FINITE = "The model produced NaN or infinite logits."
# Logits that are worked on in float32 at a time. CPU: what its cache holds, and the allocator keeps (fresh
# pages cost more than the sampling); GPU: much, for each kernel launch costs.
_CPU_BATCH = 1 << 19
_GPU_BATCH = 1 << 25


@dataclass(slots=True)
class SampledToken:
    """A token, and what the model itself thought of it: before temperature, penalties and filters."""

    token_id: int
    logprob: float | None  # natural logarithm; None unless ``params.logprobs`` is set
    top: tuple[tuple[int, float], ...]  # (id, logprob) of the likeliest, best first, then by id


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


def sample(
    logits: torch.Tensor, rows: Sequence[SamplingRow], largest: Largest | None = None
) -> list[SampledToken | NonFiniteOutput]:
    """One token for each row of ``logits`` [rows, vocabulary] (floating point, any device, not modified).

    After :func:`apply_penalties`: temperature 0 takes the largest logit, of equal ones the lowest id. Else
    one uniform number is looked up in the cumulative distribution, in the order of ids, over the tokens
    that :func:`kept_probabilities` leaves. A seed of None counts as 0. ``largest``: of these very rows, if
    somebody knows it already.

    A row in which NaN, +inf or nothing above -inf is left gets an error in place of a token; the others are
    not touched by it. Raises :class:`ValueError` where ``rows`` do not fit ``logits``, or a row has
    penalties and no history.
    """
    if logits.dim() != 2 or logits.shape[0] != len(rows):
        raise ValueError(f"{len(rows)} rows do not fit logits of shape {tuple(logits.shape)}")
    with torch.inference_mode():
        chosen = _choose(logits, rows, largest)
        asked = {
            index: (token, row.params.logprobs)
            for index, (row, token) in enumerate(zip(rows, chosen, strict=True))
            if token is not None and row.params.logprobs is not None
        }
        measured: dict[int, SampledToken | NonFiniteOutput] = {}
        if asked:  # seldom: and operators on nothing take as long as any
            outcomes = _measure(select(logits, list(asked)), list(asked.values()))
            measured.update(zip(asked, outcomes, strict=True))
    unmeasured = (
        NonFiniteOutput(_NOT_FINITE) if token is None else SampledToken(token, None, ()) for token in chosen
    )
    return [measured.get(index, token) for index, token in enumerate(unmeasured)]


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor, top: int) -> list[SampledToken]:
    """What the model thought of given tokens, as for the log probabilities of a prompt.

    ``logits`` [n, vocabulary], the token after each of them in ``targets`` [n], and the ``top`` likeliest
    beside it. A token that the model rules out (-inf) has the log probability -inf.

    Raises :class:`NonFiniteOutput` where a row has NaN, +inf or nothing above -inf: the rows are one
    prompt's. Raises :class:`ValueError` where the shapes do not fit.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"targets of shape {tuple(targets.shape)} do not fit {tuple(logits.shape)}")
    with torch.inference_mode():
        measured = _measure(logits, [(int(token), top) for token in targets.tolist()])
    for outcome in measured:
        if isinstance(outcome, NonFiniteOutput):
            raise outcome
    return [outcome for outcome in measured if isinstance(outcome, SampledToken)]


def _choose(logits: torch.Tensor, rows: Sequence[SamplingRow], largest: Largest | None) -> list[int | None]:
    """Token ids; None for a row that is not finite."""
    plain = [i for i, row in enumerate(rows) if row.params.temperature == 0 and leaves_logits_alone(row)]
    known = greedy(select(logits, plain)) if largest is None else finite(largest.of(plain))
    chosen = dict(zip(plain, known, strict=True))
    others = [index for index in range(len(rows)) if index not in chosen]
    for some in _batches(others, logits):
        # A copy in any case, for the penalties are applied in place.
        processed = select(logits, some).to(torch.float32, copy=True)
        chosen |= zip(some, _process_and_choose(processed, [rows[index] for index in some]), strict=True)
    return [chosen[index] for index in range(len(rows))]


def _process_and_choose(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    apply_penalties(logits, rows)
    chosen = greedy(logits)
    hot = [i for i, row in enumerate(rows) if row.params.temperature > 0 and chosen[i] is not None]
    if hot:
        for index, token in zip(hot, _draw(select(logits, hot), [rows[i] for i in hot]), strict=True):
            chosen[index] = token
    return chosen


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    probabilities = kept_probabilities(logits, [row.params for row in rows])
    draws = [uniform(row.params.seed or 0, row.choice, row.position) for row in rows]
    return inverse_cdf(probabilities, column(draws, logits.device, torch.float64)).tolist()


def kept_probabilities(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Float32 [rows, vocabulary]: softmax(logits / temperature), with zeros for what the filters take away.

    ``logits``: finite maxima, processed, float32. In the order of transformers' ``generate``: ``top_k``
    keeps what is not below the k-th largest; ``top_p`` (Holtzman et al., "The Curious Case of Neural Text
    Degeneration", 2020) the smallest set of the likeliest of these whose share of their mass reaches it;
    ``min_p`` (Nguyen et al., "Turning Up the Heat", 2024) what is at least that fraction of the likeliest.
    Tokens that tie with the last one kept are kept. Rows need not sum to 1.
    """
    device = logits.device
    temperatures = column([max(p.temperature, _LEAST_TEMPERATURE) for p in params], device)
    # The largest logit is taken off first: divided by a tiny temperature it would be infinite.
    relative = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperatures)
    probabilities = relative.softmax(dim=-1)
    kept = probabilities
    if any(0 < p.top_k < logits.shape[1] for p in params):
        kept = probabilities * (logits >= _top_k_floors(logits, params))
    nucleus = [index for index, p in enumerate(params) if p.top_p < 1]
    if nucleus or any(p.min_p > 0 for p in params):
        floors = probabilities.amax(dim=-1, keepdim=True) * column([p.min_p for p in params], device)
        if nucleus:
            mass = _mass_up_to(_blocks(select(kept, nucleus)))[:, -1:]
            goals = mass * column([params[i].top_p for i in nucleus], device, torch.float64)
            # Looked for among all: the likeliest are the kept ones, and these contain the goal.
            found = nucleus_floors(select(probabilities, nucleus), goals)
            floors[nucleus] = torch.maximum(found, floors[nucleus])
        kept = kept * (kept >= floors)
    return kept


def _top_k_floors(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """[rows, 1]: the k-th largest logit; -inf for the rows without ``top_k``."""
    limits = {index: p.top_k for index, p in enumerate(params) if 0 < p.top_k < logits.shape[1]}
    largest = _largest(select(logits, list(limits)), max(limits.values()))
    rank = torch.tensor([[top_k - 1] for top_k in limits.values()], device=logits.device)
    floors = logits.new_full((len(params), 1), -math.inf)
    floors[list(limits)] = largest.gather(1, rank)
    return floors


def nucleus_floors(
    probabilities: torch.Tensor, goals: torch.Tensor, candidates: int = _CANDIDATES
) -> torch.Tensor:
    """Float32 [rows, 1]: the smallest probability in the smallest set of the likeliest that reaches a goal.

    ``probabilities`` float32 [rows, vocabulary]; ``goals`` float64 [rows, 1], masses. Only the rows whose
    ``candidates`` likeliest tokens fall short are sorted whole. The result is the same either way: the sums
    run over the same numbers in the same order.
    """
    vocabulary = probabilities.shape[1]
    largest = _largest(probabilities, min(candidates, vocabulary))
    rank = torch.searchsorted(largest.cumsum(dim=-1, dtype=torch.float64), goals)
    last = largest.shape[1] - 1
    floors = largest.gather(1, rank.clamp(max=last))
    if last + 1 < vocabulary:
        short = [index for index, place in enumerate(rank.flatten().tolist()) if place > last]
        if short:
            floors[short] = nucleus_floors(select(probabilities, short), goals[short], vocabulary)
    return floors


def inverse_cdf(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Int64 [rows]: the ids at which the cumulative mass, in the order of ids, passes ``draws`` of the total.

    ``probabilities`` float32 [rows, vocabulary], some above 0, not normalised; ``draws`` float64 [rows,
    1] in [0, 1). Looks for the block of ids first, then inside it. Never gives a token of probability 0.
    """
    blocks = _blocks(probabilities)
    reached = _mass_up_to(blocks)
    # Below the total: even the largest draw, 1 - 2**-53, takes at least half a unit in the last place off.
    target = draws * reached[:, -1:]
    block = torch.searchsorted(reached, target, right=True)
    before = torch.nn.functional.pad(reached, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, _BLOCK)).squeeze(1)
    place = torch.searchsorted(before + inside.cumsum(dim=-1, dtype=torch.float64), target, right=True)
    # The sum inside the block and the block's own may differ in the last bit, at its upper edge.
    last = ((inside > 0) * torch.arange(_BLOCK, device=inside.device)).amax(dim=-1, keepdim=True)
    return (block * _BLOCK + torch.minimum(place, last)).squeeze(1)


def _blocks(probabilities: torch.Tensor) -> torch.Tensor:
    """[rows, blocks, ids of a block]; zeros behind the last token."""
    rows, vocabulary = probabilities.shape
    padded = torch.nn.functional.pad(probabilities, (0, -vocabulary % _BLOCK))
    return padded.view(rows, -1, _BLOCK)


def _mass_up_to(blocks: torch.Tensor) -> torch.Tensor:
    """Float64 [rows, blocks]: the mass of each block and those before it."""
    return blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """[rows, count]: the largest values, in descending order (values alone: ties cannot matter)."""
    if count == values.shape[1] and values.device.type == "cpu":
        # numpy sorts with vector instructions, 30 times as fast as torch. (Its partition is slower than
        # topk where most probabilities are zero, as they are at low temperatures.)
        return torch.from_numpy(np.sort(values.numpy(), axis=1)).flip(1)
    return values.topk(count, dim=-1).values


def _batches(index: list[int], logits: torch.Tensor) -> Iterator[list[int]]:
    """``index`` in pieces, each the rows that are worked on at a time."""
    size = max(1, (_CPU_BATCH if logits.device.type == "cpu" else _GPU_BATCH) // logits.shape[1])
    return (index[start : start + size] for start in range(0, len(index), size))


def _measure(logits: torch.Tensor, wanted: Sequence[tuple[int, int]]) -> list[SampledToken | NonFiniteOutput]:
    """``wanted``: for each row a token, and how many of the likeliest."""
    measured: list[SampledToken | NonFiniteOutput] = []
    for some in _batches(list(range(len(wanted))), logits):
        raw = select(logits, some).float()
        logprobs = raw.log_softmax(dim=-1)
        chosen = logprobs.gather(1, torch.tensor([[wanted[i][0]] for i in some], device=logits.device))
        likeliest = _likeliest(raw, logprobs, max(wanted[i][1] for i in some))
        for i, logprob, best in zip(some, chosen.flatten().tolist(), likeliest, strict=True):
            token, top = wanted[i]
            known = SampledToken(token, logprob, tuple(best[:top]))
            measured.append(NonFiniteOutput(_NOT_FINITE) if math.isnan(logprob) else known)
    return measured


def _likeliest(raw: torch.Tensor, logprobs: torch.Tensor, count: int) -> list[list[tuple[int, float]]]:
    """For each row (id, logprob) of the ``count`` largest logits, equal ones by id.

    Not torch.topk, which leaves open which of equal tokens it takes, and bfloat16 logits are often equal.
    """
    entries: list[list[tuple[float, int, float]]] = [[] for _ in range(raw.shape[0])]
    if count > 0:
        floors = _largest(raw, min(count, raw.shape[1]))[:, -1:]
        rows, ids = (raw >= floors).nonzero(as_tuple=True)
        columns = (rows, ids, raw[rows, ids], logprobs[rows, ids])
        for row, token, logit, logprob in zip(*(values.tolist() for values in columns), strict=True):
            entries[row].append((-logit, token, logprob))
    return [[(token, logprob) for _, token, logprob in sorted(entry)[:count]] for entry in entries]
