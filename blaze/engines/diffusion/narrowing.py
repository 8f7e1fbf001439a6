"""Denoiser calls without the images that nobody waits for any more.

A pipeline goes on with all the images that it began with. The rows of some are left out of the forward, and
it gets zeros for them. Whose a row is: the images come one after another, in as many blocks as guidance asks
for, and each block has the same latents. A call that looks otherwise stays whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from blaze.engines.diffusion.arguments import join
from blaze.engines.diffusion.merger import DenoiserCall, Result
from blaze.engines.diffusion.outputs import are_close, is_finite, select, widen

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class NarrowCall:
    """A call as it is run. ``rows``: which of the ``total`` that the pipeline asked for."""

    call: DenoiserCall
    rows: Sequence[int]
    total: int

    def widen(self, result: Result) -> Result:
        """What the pipeline gets."""
        if result.error is not None or len(self.rows) == self.total:
            return result
        try:
            return Result(widen(result.output, self.rows, self.total))
        except TypeError as error:
            return Result(error=error)


class Narrower:
    """``run``: runs calls, each by itself here.

    The first call of its structure is run whole and narrow, and compared: where the rows that stay differ,
    calls of that structure stay whole.
    """

    def __init__(self, run: Callable[[Sequence[DenoiserCall]], list[Result]]) -> None:
        self._run = run
        self._can_narrow: dict[Hashable, bool] = {}

    def narrow(self, call: DenoiserCall, wanted: Sequence[int]) -> NarrowCall:
        """``wanted``: which of the call's images somebody waits for, in order."""
        whole = NarrowCall(call, range(call.rows), call.rows)
        if call.arguments is None or call.rows % call.images or not 0 < len(wanted) < call.images:
            return whole
        rows = [start + image for start in range(0, call.rows, call.images) for image in wanted]
        if not _repeats(call, rows):
            return whole
        fewer = call.arguments.select(rows)
        part = replace(call, args=(), kwargs=join([fewer]), arguments=fewer, images=len(wanted))
        narrow = NarrowCall(part, rows, call.rows)
        return narrow if self._is_trusted(call, narrow) else whole

    def _is_trusted(self, call: DenoiserCall, narrow: NarrowCall) -> bool:
        structure = None if call.arguments is None else call.arguments.structure
        key = (id(call.denoiser), structure, call.rows // call.images)
        if key not in self._can_narrow:
            verdict = self._try(call, narrow) if _is_clear(call) else None
            if verdict is None:
                return False
            self._can_narrow[key] = verdict
        return self._can_narrow[key]

    def _try(self, call: DenoiserCall, narrow: NarrowCall) -> bool | None:
        """None: it tells nothing."""
        (whole,), (part,) = self._run([call]), self._run([narrow.call])
        if whole.error is not None:
            return None
        part = narrow.widen(part)
        try:
            mine, theirs = (select(each.output, narrow.rows, narrow.total) for each in (part, whole))
            if not is_finite(theirs):
                return None
            same = part.error is None and are_close(mine, theirs)
        except (TypeError, ValueError, RuntimeError):  # no rows, or of other shapes
            same = False
        if not same:
            logger.warning("rows cannot be left out of this denoiser's calls: they stay whole")
        return same


def _repeats(call: DenoiserCall, rows: Sequence[int]) -> bool:
    """Whether these have in each block what they have in the first; the others may be anything by now."""
    latents = None if call.arguments is None else call.arguments.denoised()
    if latents is None or len(latents) != call.rows:
        return False
    return all(torch.equal(latents[row], latents[row % call.images]) for row in rows if row >= call.images)


def _is_clear(call: DenoiserCall) -> bool:
    """Whether the repetition is one: where images have the same latents, any order looks like that."""
    latents = None if call.arguments is None else call.arguments.denoised()
    if latents is None or call.rows == call.images:
        return True
    images = latents[: call.images]
    return not any(torch.equal(one, other) for at, one in enumerate(images) for other in images[:at])
