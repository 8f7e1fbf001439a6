"""Hypothesis: no deadlines, for the machine may be busy; the same examples in every run."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("blaze", deadline=None, derandomize=True, max_examples=200)
settings.load_profile("blaze")
