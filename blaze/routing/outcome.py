"""How an attempt ended, as far as its replica is concerned."""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"  # client errors, cancels and overload say nothing about the replica
