"""What became of all requests of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.chaos.workload import Asked
from tests.streams import Answer

ROUTER_KILL_S = 2.0  # after it, broken connections still come to light
_ROUTER_LOST = "router_lost"  # see haproxy.sh


@dataclass(frozen=True)
class Record:
    asked: Asked
    answer: Answer
    wrong: str | None  # of answers that are not lost

    @property
    def is_right(self) -> bool:
        """A whole answer, and the right one."""
        return self.answer.lost is None and not self.answer.left and self.wrong is None


@dataclass(frozen=True)
class Problem:
    """A lost or wrong answer, and what is needed to find out why. Times are those of the run."""

    what: str
    asked: Asked
    began_s: float
    ended_s: float
    replica: str | None


@dataclass(frozen=True)
class Score:
    """``apart``: connections that broke with the Router that was killed under them. ``left``: by the client,
    on purpose."""

    sent: int
    lost: tuple[Problem, ...]
    wrong: tuple[Problem, ...]
    apart: int
    left: int
    longest_gap_s: float
    longest_wait_s: float  # for the first text


def score(records: Iterable[Record], *, began_at: float, router_kills: Sequence[float] = ()) -> Score:
    """``began_at``, ``router_kills``: of the clock that the answers have their times from."""
    records = list(records)
    lost, wrong, apart = [], [], 0
    for record in records:
        why = record.answer.lost
        if why is not None and _broke_with_its_router(record.answer, router_kills):
            apart += 1
        elif why is not None:
            lost.append(_problem(why, record, began_at))
        elif record.wrong is not None:
            wrong.append(_problem(record.wrong, record, began_at))
    answers = [record.answer for record in records]
    return Score(
        sent=len(records),
        lost=tuple(lost),
        wrong=tuple(wrong),
        apart=apart,
        left=sum(answer.left for answer in answers),
        longest_gap_s=max((answer.longest_gap_s for answer in answers), default=0.0),
        longest_wait_s=max((answer.first_text_s or 0.0 for answer in answers), default=0.0),
    )


def _broke_with_its_router(answer: Answer, router_kills: Sequence[float]) -> bool:
    """It was under way when a Router was killed, and its connection broke right after. An error that a Router
    tells is never that; one of HAProxy's is, which says that way that the connection behind it broke."""
    return (answer.broke or answer.error_code == _ROUTER_LOST) and any(
        answer.started_at <= at <= answer.ended_at <= at + ROUTER_KILL_S for at in router_kills
    )


def _problem(what: str, record: Record, began_at: float) -> Problem:
    answer = record.answer
    return Problem(
        what, record.asked, answer.started_at - began_at, answer.ended_at - began_at, answer.replica
    )


def summary(problems: Sequence[Problem]) -> Counter[str]:
    return Counter(problem.what for problem in problems)
