"""One attempt on one replica: its events, its outcome, what it says of the replica."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from blaze.clock import Clock
from blaze.errors import (
    BlazeError,
    DeadlineExceeded,
    EngineFailure,
    ErrorInfo,
    ReplicaDrained,
    ReplicaLost,
    ReplicaUnreachable,
)
from blaze.routing.accounting import ModelAccount
from blaze.routing.cost import OUTPUT_TOKEN, PROMPT_TOKEN, CostModel
from blaze.routing.outcome import Outcome
from blaze.routing.pool import ReplicaCall
from blaze.routing.replica import Lease
from blaze.routing.replicas import ReplicaTable
from blaze.routing.route import Death, Route
from blaze.routing.running import Running
from blaze.types import (
    Event,
    Events,
    Failed,
    Finished,
    GenerateRequest,
    ImageRequest,
    Progress,
    Request,
    Started,
)


@dataclass(frozen=True, slots=True)
class RoutingState:
    """What the answers of one model share."""

    table: ReplicaTable
    account: ModelAccount
    costs: CostModel
    clock: Clock
    suspend_s: float
    deadline_grace_s: float
    running: Running


class Attempt:
    """Batches of events that end with exactly one terminal event."""

    def __init__(self, route: Route, call: ReplicaCall, lease: Lease, state: RoutingState) -> None:
        self.route = route
        self.replica_id = lease.replica.id
        self.error: ErrorInfo | None = None  # when the answer is nothing but an error
        self._request: Request = route.request
        self._call = call
        self._lease = lease
        self._state = state
        self._first: Events = ()
        self._ended = False  # as far as the replica is concerned
        self._told = False  # the terminal event has been given out
        self._taken_up = False  # the engine has begun with it
        self._shown = False  # content has come
        self.death: Death | None = None  # the replica went as the engine had taken it up, and nothing came
        # The engine keeps the deadline itself and says so; who says nothing for a while longer has failed.
        # One timer for all of the answer: one per batch would be a good part of what a batch costs.
        self._patience_ends = route.deadline + state.deadline_grace_s
        self._reader: asyncio.Task[object] | None = None
        self._broken: Events | None = None  # how it ends here, whatever the replica says
        state.running.add(self)
        self._timer = asyncio.get_running_loop().call_later(
            max(0.0, self._patience_ends - state.clock.now()), self._give_up
        )

    async def begin(self) -> None:
        """Wait for the first content. What comes before it (``Started``, ``Progress`` that nobody asked for)
        commits to nothing: until content arrives, the request can begin anew on another replica."""
        events: Events = ()
        while True:
            events += await self._next()
            last = events[-1]
            has_content = any(map(self._is_content, events))
            if isinstance(last, Failed) and not has_content:
                self.error = last.error
                if isinstance(events[0], Started):
                    self.death = self.death_by(last.error)
                self._first = (last,)
                return
            if has_content:
                self._first = events
                self._shown = True
                self._note_first_content(events)
                return

    def death_by(self, error: ErrorInfo) -> Death | None:
        """With the error its replica went; None: that is no sign of it."""
        silent = self._broken is _SILENT
        if not (error.replica_gone and error.is_failure) or (silent and self._shown):
            return None  # who has worked on it and then falls silent may have any reason for that
        return Death(
            self._lease.replica,
            certain=error.code == ReplicaLost.code,
            silent=silent,
            at=self._state.clock.now(),
        )

    def _is_content(self, event: Event) -> bool:
        """Something that is shown to whoever reads the answer: a preview is, and a step where they were
        asked for."""
        if isinstance(event, Progress):
            return isinstance(self._request, ImageRequest) and self._request.progress
        return not isinstance(event, Started | Failed)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Events:
        if self._first:
            first, self._first = self._first, ()
            return first
        if self._told:
            raise StopAsyncIteration
        return await self._next()

    async def _next(self) -> Events:
        events = await self._receive()
        last = events[-1]
        self._taken_up = self._taken_up or isinstance(events[0], Started)
        if isinstance(last, Finished):
            self._told = True
            self._finished(last)
        elif isinstance(last, Failed):
            self._told = True
            if last.error.replica_gone and not self._ended:  # or it is old news of the replica
                self._state.table.suspend(self.replica_id, self._state.suspend_s)
                self._note_death(last.error)
            failed = last.error.is_failure or self._broken is _TOO_LATE
            self._end(Outcome.FAILURE if failed else Outcome.NEUTRAL, last.error.retry_after_s)
        return events

    async def _receive(self) -> Events:
        """The next batch; whatever goes wrong is a terminal event."""
        if self._state.clock.now() >= self._patience_ends:
            self._give_up()
        if self._broken is not None:
            return self._broken
        reader = self._reader = asyncio.current_task()
        assert reader is not None
        before = reader.cancelling()
        try:
            return await anext(self._call)
        except StopAsyncIteration:
            return self._end_here() or _failed(EngineFailure("The replica gave no result."))
        except asyncio.CancelledError:
            # As asyncio.timeout tells them apart: when others have cancelled it too, it stays cancelled.
            end = self._end_here()
            if end is None or reader.uncancel() > before:
                raise
            return end
        except BlazeError as error:
            end = self._end_here()
            if end is not None and reader.cancelling() > before:
                reader.uncancel()  # the call has said in its own words that it ends
            return end or _failed(error)
        finally:
            self._reader = None

    # --- Moving ---------------------------------------------------------------------------------------

    @property
    def stays_until(self) -> float | None:
        """Its replica is being drained; None: it is not."""
        return self._lease.replica.drained_until

    @property
    def may_move(self) -> bool:
        """Somebody is reading it, who will take notice, and there is a way.

        A text goes on only on a replica of its own variant, and whether one is that only shows when it has
        begun: until then the text stays, so what is sent there has to know all of it.
        """
        if self._ended or self._broken is not None or self._reader is None or self.route.ahead is not None:
            return False
        return self._shown or not self._goes_on_from

    @property
    def _goes_on_from(self) -> str:
        """The variant that began the answer; empty: what comes begins it, or it begins anew."""
        return self._request.variant if isinstance(self._request, GenerateRequest) else ""

    def move_to(self, lease: Lease) -> None:
        """There is a place elsewhere. A text that has begun goes there after its next batch, and leaves this
        replica when it has begun there; all else begins there anew, at once."""
        self.route.ahead = lease
        if not (self._shown and isinstance(self._request, GenerateRequest)):
            self._break(_DRAINED)

    def end(self, error: BlazeError) -> None:
        """Here and for good."""
        self._break(_failed(error))

    def lose(self) -> None:
        """The replica does not answer any more: the attempt ends here, for a frozen one never says so."""
        self._break(_SILENT)

    def _give_up(self) -> None:
        self._break(_TOO_LATE)

    def _end_here(self) -> Events | None:
        return self._broken  # which others set while the reader waits

    def _break(self, end: Events) -> None:
        if self._ended or self._broken is not None:
            return
        self._broken = end
        self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
        else:  # at once: who does not read may never come back, and its place would stay taken
            self._end(Outcome.FAILURE if end is _SILENT else Outcome.NEUTRAL)

    # --- What the answer says of its replica ---------------------------------------------------------

    def _note_death(self, error: ErrorInfo) -> None:
        """In case it has ended: who was only sent to one that had died before says nothing of why it did."""
        if self._taken_up and error.is_failure:
            self._state.account.died_at_work(self.replica_id)

    def _note_first_content(self, events: Events) -> None:
        state, request = self._state, self._request
        after_s = state.clock.now() - self._lease.started_at
        state.account.first_content(after_s)
        # A picture comes whole: its time is known at the end, and is only then comparable.
        self._lease.first_content(after_s if isinstance(request, GenerateRequest) else None)
        first = events[0]
        if isinstance(first, Started) and first.prompt_token_ids and isinstance(request, GenerateRequest):
            count = len(first.prompt_token_ids)
            self._lease.recost(state.costs.of_text(request, count, cached_tokens=0))

    def _finished(self, event: Finished) -> None:
        state, usage = self._state, event.usage
        response_s: float | None = None
        if isinstance(self._request, GenerateRequest):
            uncached = max(0, usage.prompt_tokens - usage.cached_tokens)
            self._lease.recost(PROMPT_TOKEN * uncached + OUTPUT_TOKEN * usage.completion_tokens)
            state.costs.finished(usage.completion_tokens / self._request.sampling.n)
        else:
            # Of a request of typical cost, for pictures differ in steps and size.
            took_s = state.clock.now() - self._lease.started_at
            response_s = took_s * state.costs.typical / self._lease.cost
        self._end(Outcome.SUCCESS, response_s)
        state.account.finished(usage)

    def _end(self, outcome: Outcome, response_s: float | None = None) -> None:
        self._ended = True
        self._timer.cancel()
        self._state.running.discard(self)
        if self._broken is not _DRAINED:  # who is on the way there takes it up
            self.route.drop_ahead()
        if self._lease.release(outcome, response_s=response_s):
            self._state.account.outcome(outcome)

    async def aclose(self) -> None:
        """Give everything back. An answer that was not read to its end counts as cancelled: neutral."""
        if not self._ended:
            self._end(Outcome.NEUTRAL)
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _failed(error: BlazeError) -> Events:
    return (Failed(error.info),)


_TOO_LATE = _failed(DeadlineExceeded("The request's deadline passed before it was finished."))
_DRAINED = _failed(ReplicaDrained("The replica is being drained."))
_SILENT = _failed(ReplicaUnreachable("The replica does not answer any more."))
