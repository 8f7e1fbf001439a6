"""What values from clients must satisfy: shared by the requests, which check themselves."""

from __future__ import annotations

from blaze.errors import InvalidRequest

MOST_SECONDS = 10_000_000  # four months
SEED_BOUND = 2**63  # seeds are int64: -SEED_BOUND <= seed < SEED_BOUND


def check(holds: bool, field_name: str, rule: str) -> None:
    """Raises :class:`InvalidRequest` unless ``holds``, which is False also for comparisons with NaN."""
    if not holds:
        raise InvalidRequest(f"{field_name}: {rule}.", param=field_name)


def check_integer(value: int | None, field_name: str, least: int, most: int) -> None:
    holds = value is None or (type(value) is int and least <= value <= most)
    check(holds, field_name, f"must be an integer, {least} to {most}")


def check_seed(seed: int | None) -> None:
    fits = seed is None or (type(seed) is int and -SEED_BOUND <= seed < SEED_BOUND)
    check(fits, "seed", "must be a 64-bit signed integer")


def check_timeout(timeout_s: float | None) -> None:
    good = timeout_s is None or (is_number(timeout_s) and 0 <= timeout_s <= MOST_SECONDS)
    check(good, "timeout_s", f"must be a number of seconds, 0 to {MOST_SECONDS:,}")


def check_text(value: str | None, field_name: str) -> None:
    """Lone surrogates, which no JSON over HTTP brings, come over a handle."""
    good = value is None or (isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value))
    check(good, field_name, "must be text")


def is_count(value: int) -> bool:
    return type(value) is int and value >= 1


def is_index(value: int, least: int = 0) -> bool:
    return type(value) is int and value >= least


def is_number(value: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def are_texts(values: tuple[str, ...]) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, str) and value for value in values)
