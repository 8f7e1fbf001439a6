"""One forward of the denoiser for many calls: joined, kept within memory, and checked to be the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from blaze.engines.diffusion.adapters import Adapters
from blaze.engines.diffusion.arguments import Arguments, Signature, join
from blaze.engines.diffusion.lanes import Lanes
from blaze.engines.diffusion.outputs import are_close, is_finite, join_outputs, split, tensors_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class DenoiserCall:
    """A call as the pipeline made it. ``adapters``: those that are on while it runs."""

    denoiser: Denoiser
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    arguments: Arguments | None  # None: it cannot be joined with others
    images: int
    adapters: Adapters = ()

    @property
    def rows(self) -> int:
        return 1 if self.arguments is None else self.arguments.rows

    @property
    def key(self) -> Hashable:
        return (id(self.denoiser), None if self.arguments is None else self.arguments.key)

    def goes_with(self, other: DenoiserCall) -> bool:
        mine, theirs = self.arguments, other.arguments
        return (
            self.denoiser is other.denoiser
            and self.adapters == other.adapters
            and mine is not None
            and theirs is not None
            and mine.goes_with(theirs)
        )

    def alone(self) -> object:
        return self.denoiser.forward(*self.args, **self.kwargs)


@dataclass(eq=False)
class Denoiser:
    """The shared module, and what its signature is."""

    module: nn.Module
    signature: Signature | None = field(init=False)

    def __post_init__(self) -> None:
        self.signature = Signature.of(self.module)

    def call(
        self,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        *,
        images: int = 1,
        adapters: Adapters = (),
    ) -> DenoiserCall:
        arguments = None if self.signature is None else Arguments.read(self.signature, args, kwargs)
        return DenoiserCall(self, args, kwargs, arguments, images, adapters)

    def forward(self, *args: object, **kwargs: object) -> object:
        """Not ``module(...)``: the copies that pipelines call run the module's hooks, once per request."""
        compiled: Callable[..., object] | None = self.module._compiled_call_impl
        return (compiled or self.module.forward)(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Result:
    """What a call returned, or what it raised."""

    output: object = None
    error: Exception | None = None


class Merger:
    """Chooses which waiting calls run next, and runs them as one.

    ``fixed_rows``: every forward has so many rows, filled up with copies of the first one, so that the bits
    of a row depend on nothing beside it. Calls whose rows turn out to depend on their company are run alone.
    """

    def __init__(
        self,
        *,
        max_images: int,
        fixed_rows: int | None = None,
        on_step: Callable[[], None] = lambda: None,
        activate: Callable[[Adapters], None] = lambda _adapters: None,
        lanes: Lanes | None = None,
    ) -> None:
        self._max_images = max_images
        self._fixed_rows = fixed_rows
        self._on_step = on_step
        self._activate = activate
        self._lanes = lanes
        self._row_limits: dict[Hashable, int] = {}  # where memory ran out
        self._can_join: dict[Hashable, bool] = {}  # by structure, or with fixed rows by key: as was tried

    def choose(self, waiting: Sequence[DenoiserCall]) -> list[int]:
        """Which calls run next: the first, which waits longest, and those that go with it and fit."""
        first = waiting[0]
        chosen, images = [0], first.images
        for index, call in enumerate(waiting[1:], start=1):
            if images + call.images <= self._max_images and call.goes_with(first):
                chosen.append(index)
                images += call.images
        return chosen

    def run(self, calls: Sequence[DenoiserCall]) -> list[Result]:
        """A result for every call, in order; the calls go with each other. Raises nothing.

        Out of memory halves the rows of a forward; after another error the calls run one by one, so that
        only the guilty one fails.
        """
        results: list[Result] = []
        while len(results) < len(calls):
            fitting = self._fitting(calls[len(results) :])
            results += self._run_fitting(fitting) or []  # none: once more, with the smaller limit
        return results

    # --- Limits ------------------------------------------------------------------------------------

    def _limit(self, call: DenoiserCall) -> int | None:
        """Rows of a forward. None: as many as there are."""
        return self._row_limits.get(call.key, self._fixed_rows)

    def _is_cut(self, call: DenoiserCall) -> bool:
        """Whether it has too many rows for one forward."""
        limit = self._limit(call)
        return limit is not None and call.rows > limit

    def _is_one(self, calls: Sequence[DenoiserCall]) -> bool:
        """Whether they are one call that runs as it is."""
        return len(calls) == 1 and self._fixed_rows is None and not self._is_cut(calls[0])

    def _may_split(self, call: DenoiserCall) -> bool:
        return self._lanes is not None and self._lanes.may_split(call.rows)

    def _fitting(self, calls: Sequence[DenoiserCall]) -> Sequence[DenoiserCall]:
        """At least the first of them, which is cut into pieces if it does not fit."""
        limit = self._limit(calls[0])
        rows = 0
        for count, call in enumerate(calls):
            rows += call.rows
            if limit is not None and rows > limit and count:
                return calls[:count]
        return calls

    def _lower_limit(self, calls: Sequence[DenoiserCall]) -> bool:
        """False: it is as low as it can be."""
        rows = sum(call.rows for call in calls)
        if (limit := self._limit(calls[0])) is not None:
            rows = limit if self._fixed_rows else min(rows, limit)
        if calls[0].arguments is None or rows == 1:
            return False
        self._row_limits[calls[0].key] = rows // 2
        logger.warning("out of memory with %d rows; going on with %d at a time", rows, rows // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    # --- Forwards ----------------------------------------------------------------------------------

    def _run_fitting(self, calls: Sequence[DenoiserCall]) -> list[Result] | None:
        """None: memory ran out, and the limit has been lowered."""
        try:
            self._activate(calls[0].adapters)
            return [Result(output) for output in self._outputs(calls)]
        except Exception as error:
            out_of_memory = is_out_of_memory(error)
            if not out_of_memory:
                logger.warning("the denoiser failed with %d calls", len(calls), exc_info=True)
            kept = error.with_traceback(None)  # its frames would hold the memory that ran out
        if out_of_memory and self._lower_limit(calls):
            return None
        if len(calls) == 1:
            return [Result(error=kept)]
        return [result for call in calls for result in self.run([call])]

    def _outputs(self, calls: Sequence[DenoiserCall]) -> list[object]:
        first, limit, fixed = calls[0], self._limit(calls[0]), self._fixed_rows is not None
        if first.arguments is None or (self._is_one(calls) and not self._may_split(first)):
            return [self._alone(call) for call in calls]
        verdict_key = (id(first.denoiser), first.arguments.structure, (first.key, limit) if fixed else None)
        if verdict_key not in self._can_join:
            return self._try_joining(calls, verdict_key)
        if self._can_join[verdict_key]:
            return self._joined(calls)
        return [self._alone(call) for call in calls]

    def _alone(self, call: DenoiserCall) -> object:
        lanes = self._lanes
        output = call.alone() if lanes is None else lanes.one(call.alone, call.rows, call.key)
        self._on_step()
        return output

    def _joined(self, calls: Sequence[DenoiserCall]) -> list[object]:
        parts = [call.arguments for call in calls if call.arguments is not None]
        limit = self._limit(calls[0])
        if limit is None or not self._is_cut(calls[0]):
            return self._forward(calls[0], parts)
        return [join_outputs([self._forward(calls[0], [piece])[0] for piece in _pieces(parts[0], limit)])]

    def _forward(self, call: DenoiserCall, parts: Sequence[Arguments]) -> list[object]:
        sizes = [part.rows for part in parts]
        padding: list[Arguments] = []
        if self._fixed_rows is not None and (limit := self._limit(call)) is not None:
            padding = [parts[0].cut(0, 1)] * (limit - sum(sizes))
        output = self._plain(call, [*parts, *padding])
        return split(output, [*sizes, *(1 for _ in padding)])[: len(parts)]

    def _plain(self, call: DenoiserCall, parts: Sequence[Arguments]) -> object:
        forward, lanes = call.denoiser.forward, self._lanes
        output = forward(**join(parts)) if lanes is None else lanes.run(forward, parts, call.key)
        self._on_step()
        return output

    # --- Trust -------------------------------------------------------------------------------------

    def _try_joining(self, calls: Sequence[DenoiserCall], verdict_key: Hashable) -> list[object]:
        """The first calls of their structure, joined and alone: what differs is never joined again."""
        alone = [self._by_itself(call) for call in calls]
        if not is_finite(alone):
            return alone  # which tells nothing of joining
        try:
            joined = [self._in_halves(calls[0])] if self._is_one(calls) else self._joined(calls)
            same = all(are_close(mine, other) for mine, other in zip(joined, alone, strict=True))
            if same and self._fixed_rows is not None:
                same = self._is_invariant(calls[0], joined[0])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logger.warning("denoiser calls cannot be joined: %s", error)
            joined, same = [], False
        self._can_join[verdict_key] = same
        if same:
            return alone if self._fixed_rows is None else joined
        logger.warning("joined denoiser calls differ from the same calls alone: not joined any more")
        return [
            self._alone(call) if self._is_cut(call) else result
            for call, result in zip(calls, alone, strict=True)
        ]

    def _by_itself(self, call: DenoiserCall) -> object:
        """What to compare with. A call with too many rows for one forward is cut otherwise than usual."""
        limit = self._limit(call)
        if call.arguments is None or limit is None or not self._is_cut(call):
            return self._alone(call)
        pieces = _pieces(call.arguments, max(1, limit // 2))
        return join_outputs([self._plain(call, [piece]) for piece in pieces])

    def _in_halves(self, call: DenoiserCall) -> object:
        assert call.arguments is not None
        halves = _pieces(call.arguments, (call.rows + 1) // 2)
        return join_outputs([self._plain(call, [piece]) for piece in halves])

    def _is_invariant(self, call: DenoiserCall, output: object) -> bool:
        """Whether the bits of a row depend neither on its place in the batch nor on its neighbours."""
        limit = self._limit(call)
        if call.arguments is None or limit is None:
            return False
        copies = self._plain(call, [call.arguments.cut(0, 1)] * limit)
        return all(
            torch.equal(row, mine[0])
            for mine, rows in zip(tensors_of(output), tensors_of(copies), strict=True)
            for row in rows.unbind()
        )


def _pieces(whole: Arguments, rows: int) -> list[Arguments]:
    """Of so many rows each, the last one of what is left."""
    return [whole.cut(start, min(start + rows, whole.rows)) for start in range(0, whole.rows, rows)]


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU allocator, which has no exception of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    signs = ("out of memory", "not enough memory", "allocate memory")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
