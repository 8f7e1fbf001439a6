"""What is done to the logits before a token is drawn: biases, penalties, end tokens that come too early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from blaze.sampling_params import SamplingParams


class TokenHistory:
    """What the penalties look at: of the prompt, whether a token occurs; of the output, how often.

    The tensors over the vocabulary (1 byte a token for the repetition penalty, 4 for the others) are made
    when a penalty first asks for them, and from then on updated by the tokens that came since.
    """

    def __init__(self, prompt_ids: Sequence[int], generated: Sequence[int] = ()) -> None:
        """``generated``: tokens of the output so far, when the choice was begun elsewhere."""
        self._prompt_ids = tuple(prompt_ids)
        self._generated = list(generated)
        self._seen: torch.Tensor | None = None
        self._num_seen = 0  # of the generated tokens, those that ``_seen`` knows of
        self._counts: torch.Tensor | None = None
        self._num_counted = 0

    def append(self, token_id: int) -> None:
        """Notes one more token of the output. O(1)."""
        self._generated.append(token_id)

    def seen(self, vocabulary: int, device: torch.device) -> torch.Tensor:
        """Bool [vocabulary]: the token occurs in prompt or output. Valid until the next ``append``."""
        if self._seen is None or not _is_like(self._seen, vocabulary, device):
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._seen[_inside(self._prompt_ids, vocabulary, device)] = True
            self._num_seen = 0
        if self._num_seen < len(self._generated):
            fresh = _inside(self._generated[self._num_seen :], vocabulary, device)
            self._seen.index_fill_(0, fresh, True)
            self._num_seen = len(self._generated)
        return self._seen

    def counts(self, vocabulary: int, device: torch.device) -> torch.Tensor:
        """Int32 [vocabulary]: how often the token occurs in the output. Valid until the next ``append``."""
        if self._counts is None or not _is_like(self._counts, vocabulary, device):
            self._counts = torch.zeros(vocabulary, dtype=torch.int32, device=device)
            self._num_counted = 0
        if self._num_counted < len(self._generated):
            fresh = _inside(self._generated[self._num_counted :], vocabulary, device)
            self._counts.index_add_(0, fresh, torch.ones_like(fresh, dtype=torch.int32))
            self._num_counted = len(self._generated)
        return self._counts


@dataclass(slots=True)
class SamplingRow:
    """What is drawn from one row of logits."""

    params: SamplingParams
    choice: int  # index of the choice
    position: int  # index of the generated token that is drawn now
    history: TokenHistory | None  # only where :func:`needs_history` says so
    end_ids: frozenset[int]  # end-of-sequence and stop tokens: forbidden before ``params.min_tokens``


def needs_history(params: SamplingParams) -> bool:
    """Whether a penalty looks at the tokens before."""
    return _counts_output(params) or params.repetition_penalty != 1


def leaves_logits_alone(row: SamplingRow) -> bool:
    """Whether :func:`apply_penalties` would change nothing in this row."""
    return not (row.params.logit_bias or needs_history(row.params) or _end_is_too_early(row))


def apply_penalties(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Changes float32 ``logits`` [rows, vocabulary] in place, each row by its own parameters only.

    In the order of transformers' ``generate``: biases are added; the repetition penalty (Keskar et al.,
    "CTRL", 2019) divides positive and multiplies negative logits of tokens in prompt or output; frequency
    and presence penalties (OpenAI's API reference) are taken off the tokens of the output; end tokens that
    come too early get -inf. Ids outside the vocabulary concern no logit and are passed over.

    Raises :class:`ValueError` where a row has penalties and no history.
    """
    _add_biases(logits, rows)
    repeating = [index for index, row in enumerate(rows) if row.params.repetition_penalty != 1]
    if repeating:
        _penalise_repetition(logits, rows, repeating)
    counting = [index for index, row in enumerate(rows) if _counts_output(row.params)]
    if counting:
        _penalise_counts(logits, rows, counting)
    _forbid_early_ends(logits, rows)


def _add_biases(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    vocabulary = logits.shape[1]
    entries = [
        (index, token, bias)
        for index, row in enumerate(rows)
        for token, bias in row.params.logit_bias
        if token < vocabulary
    ]
    if entries:
        index, tokens, biases = zip(*entries, strict=True)
        where = (_ids(index, logits.device), _ids(tokens, logits.device))
        # Accumulated: an id that is named twice gets both biases.
        logits.index_put_(where, torch.tensor(biases, device=logits.device), accumulate=True)


def _penalise_repetition(logits: torch.Tensor, rows: Sequence[SamplingRow], repeating: list[int]) -> None:
    vocabulary, device = logits.shape[1], logits.device
    seen = torch.stack([_history(rows[index]).seen(vocabulary, device) for index in repeating])
    factor = seen * column([rows[index].params.repetition_penalty for index in repeating], device)
    factor += ~seen  # the penalty where a token was seen, 1 elsewhere
    index = _ids(repeating, device)
    chosen = logits.index_select(0, index)
    # One of the two terms is zero. On CPUs this is several times faster than torch.where.
    penalised = chosen.clamp(min=0).div_(factor).add_(chosen.clamp_(max=0).mul_(factor))
    logits.index_copy_(0, index, penalised)


def _penalise_counts(logits: torch.Tensor, rows: Sequence[SamplingRow], counting: list[int]) -> None:
    vocabulary, device = logits.shape[1], logits.device
    counts = torch.stack([_history(rows[index]).counts(vocabulary, device) for index in counting])
    penalty = counts * column([rows[index].params.frequency_penalty for index in counting], device)
    penalty += (counts > 0) * column([rows[index].params.presence_penalty for index in counting], device)
    logits.index_add_(0, _ids(counting, device), penalty, alpha=-1)


def _forbid_early_ends(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    vocabulary = logits.shape[1]
    ends = [
        (index, token)
        for index, row in enumerate(rows)
        if _end_is_too_early(row)
        for token in row.end_ids
        if token < vocabulary
    ]
    if ends:
        index, tokens = zip(*ends, strict=True)
        where = (_ids(index, logits.device), _ids(tokens, logits.device))
        logits.index_put_(where, torch.tensor(-math.inf, device=logits.device))


def _end_is_too_early(row: SamplingRow) -> bool:
    return row.position < row.params.min_tokens and bool(row.end_ids)


def _counts_output(params: SamplingParams) -> bool:
    return params.frequency_penalty != 0 or params.presence_penalty != 0


def _history(row: SamplingRow) -> TokenHistory:
    if row.history is None:
        raise ValueError("a row with penalties needs its token history")
    return row.history


def column(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[values, 1]: one number for each row."""
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)


def select(tensor: torch.Tensor, index: Sequence[int]) -> torch.Tensor:
    """The rows ``index``, ascending: the tensor itself where these are all, else a copy."""
    return tensor if len(index) == tensor.shape[0] else tensor.index_select(0, _ids(index, tensor.device))


def _ids(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _inside(token_ids: Sequence[int], vocabulary: int, device: torch.device) -> torch.Tensor:
    """Prompts may hold ids above the logits' last one: embeddings can be wider than the output layer."""
    return _ids([token for token in token_ids if token < vocabulary], device)


def _is_like(tensor: torch.Tensor, vocabulary: int, device: torch.device) -> bool:
    return tensor.shape[0] == vocabulary and tensor.device == device
