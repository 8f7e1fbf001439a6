"""Seeded runs of faults under load: `python -m tests.chaos`."""
