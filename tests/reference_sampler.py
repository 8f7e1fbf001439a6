"""The sampler's definition, slow and in float64: what ``blaze.engines.llm.sampling`` is held to.

Written from the meaning of the parameters (blaze/types.py) and the order of transformers' ``generate``; of
the module under test it shares the uniform numbers alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from blaze.engines.llm.sampling import uniform
from blaze.sampling_params import SamplingParams

Scores = np.ndarray[tuple[int], np.dtype[np.float64]]


def reference_sample(
    logits: Sequence[float] | np.ndarray,
    params: SamplingParams,
    choice: int,
    position: int,
    prompt_ids: Sequence[int],
    generated_ids: Sequence[int],
    end_ids: Collection[int],
) -> tuple[int, float]:
    """The token, and the margin by which it was chosen: below it, rounding may choose another one.

    Temperature 0: the distance of the two best logits (0 for equal ones: then the lowest id is right, but
    only for a sampler that sees exactly these logits). Otherwise the smallest of: the distance of the draw to
    the nearest edge of the token's interval in [0, 1), and the distances by which filters decided.
    """
    scores = processed_scores(logits, params, position, prompt_ids, generated_ids, end_ids)
    if params.temperature == 0:
        token = int(scores.argmax())  # of equal ones the first
        others = np.delete(scores, token)
        return token, float(scores[token] - others.max()) if others.size else math.inf
    weights, margin = kept_weights(scores, params)
    target = uniform(params.seed or 0, choice, position) * weights.sum()
    reached = 0.0
    for token in np.flatnonzero(weights).tolist():
        before, reached = reached, reached + weights[token]
        if target < reached:
            break
    edge = min(target - before, reached - target) / weights.sum()
    return token, min(margin, abs(float(edge)))


def processed_scores(
    logits: Sequence[float] | np.ndarray,
    params: SamplingParams,
    position: int,
    prompt_ids: Sequence[int],
    generated_ids: Sequence[int],
    end_ids: Collection[int],
) -> Scores:
    """Bias, repetition penalty, frequency and presence penalty, end tokens that come too early."""
    scores: Scores = np.array(logits, dtype=np.float64)
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in {*prompt_ids, *generated_ids}:
        if scores[token] > 0:
            scores[token] /= params.repetition_penalty
        else:
            scores[token] *= params.repetition_penalty
    for token, count in Counter(generated_ids).items():
        scores[token] -= params.frequency_penalty * count + params.presence_penalty
    if position < params.min_tokens:
        scores[list(end_ids)] = -math.inf
    if not math.isfinite(scores.max()):
        raise ValueError("nothing can be drawn from these logits")
    return scores


def kept_weights(scores: Scores, params: SamplingParams) -> tuple[Scores, float]:
    """Weights that are proportional to the probabilities, 0 for what is filtered; and the filters' margin."""
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is right
        scaled = (scores - scores.max()) / params.temperature
    kept = np.isfinite(scaled)
    margin = math.inf
    if 0 < params.top_k < scaled.size:
        kept, margin = _at_least(scaled, kept, np.sort(scaled)[-params.top_k], margin)
    if params.top_p < 1:
        weights = np.exp(scaled) * kept
        shares = np.sort(weights)[::-1] / weights.sum()
        reached = np.cumsum(shares)
        last = min(int(np.searchsorted(reached, params.top_p)), shares.size - 1)
        # Reached neither just before the last one kept nor only just by it.
        margin = min(margin, *np.abs(reached[max(last - 1, 0) : last + 1] - params.top_p))
        kept, margin = _at_least(scaled, kept, np.sort(scaled[kept])[::-1][last], margin)
    if params.min_p > 0:
        ratios = np.exp(scaled)  # of the likeliest one's probability
        margin = min(margin, float(np.abs(ratios - params.min_p)[kept & (ratios < 1)].min(initial=math.inf)))
        kept &= ratios >= params.min_p
    return np.exp(scaled) * kept, margin


def _at_least(scaled: Scores, kept: np.ndarray, floor: float, margin: float) -> tuple[np.ndarray, float]:
    """What is kept of ``kept``; the margin is at most the distance to the best one that is not."""
    filtered = scaled[kept & (scaled < floor)]
    gap = floor - filtered.max() if filtered.size else math.inf
    return kept & (scaled >= floor), min(margin, float(gap))
