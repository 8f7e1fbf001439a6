from __future__ import annotations

from typing import Any

from blaze.recovery import Action, Recovery, RecoverySettings
from tests.fakes import FakeClock

NONE, REBUILD, GIVE_UP = Action.NONE, Action.REBUILD, Action.GIVE_UP


def recovery(**settings: Any) -> tuple[Recovery, FakeClock]:
    clock = FakeClock()
    return Recovery(RecoverySettings(**settings), clock), clock


def checks(subject: Recovery, count: int) -> list[Action]:
    """So many failed checks in a row."""
    return [subject.failed() for _ in range(count)]


def test_an_engine_is_built_again_after_so_many_failed_checks_in_a_row() -> None:
    subject, _ = recovery(threshold=3)
    assert checks(subject, 2) == [NONE, NONE]
    subject.well()
    assert checks(subject, 3) == [NONE, NONE, REBUILD]


def test_the_pause_between_attempts_doubles_up_to_a_limit() -> None:
    subject, clock = recovery(threshold=1, max_attempts=9, backoff_s=10.0, max_backoff_s=35.0)
    for pause in (10.0, 20.0, 35.0, 35.0):
        assert subject.failed() is REBUILD
        assert subject.rebuilt(successfully=False) == pause
        clock.advance(pause - 1)
        assert subject.failed() is NONE
        clock.advance(1)


def test_attempts_are_bounded_and_giving_up_is_said_once() -> None:
    subject, _ = recovery(threshold=2, max_attempts=2, backoff_s=0.0)
    assert checks(subject, 2) == [NONE, REBUILD]
    subject.rebuilt(successfully=False)
    assert subject.failed() is REBUILD
    subject.rebuilt(successfully=False)
    assert checks(subject, 3) == [GIVE_UP, NONE, NONE]
    assert subject.given_up


def test_an_engine_that_fails_again_soon_has_its_attempts_still_counted() -> None:
    subject, _ = recovery(threshold=2, max_attempts=1, backoff_s=0.0)
    assert checks(subject, 2) == [NONE, REBUILD]
    subject.rebuilt(successfully=True)
    subject.well()
    assert checks(subject, 2) == [NONE, GIVE_UP]


def test_an_engine_that_stays_well_has_a_clean_record() -> None:
    subject, _ = recovery(threshold=2, max_attempts=1, backoff_s=0.0)
    checks(subject, 2)
    subject.rebuilt(successfully=True)
    subject.well()
    subject.well()
    assert checks(subject, 2) == [NONE, REBUILD]


def test_without_attempts_it_is_given_up_and_comes_back_only_by_itself() -> None:
    subject, _ = recovery(threshold=2, max_attempts=0)
    assert checks(subject, 2) == [NONE, GIVE_UP]
    subject.well()
    assert not subject.given_up
    assert checks(subject, 2) == [NONE, GIVE_UP]
