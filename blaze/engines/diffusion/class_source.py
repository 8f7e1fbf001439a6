"""The source of pipeline classes: what they check, and ask of their parts, is told by no signature."""

from __future__ import annotations

import functools
import inspect
import re

# What every pipeline can do besides drawing: loading, saving, adapters.
_COMMON = re.compile(r"diffusers\.((?!pipelines\.)|pipelines\.pipeline_utils)")


@functools.cache
def class_source(kind: type) -> str:
    """Of all methods that draw, the class's own and inherited ones."""
    methods = (method for _name, method in inspect.getmembers(kind, inspect.isfunction))
    return "\n".join(inspect.getsource(method) for method in methods if not _COMMON.match(method.__module__))


def checked_side_factors(kind: type) -> set[int]:
    """What the class has height and width be multiples of, where that is a number: 8, most often, even for
    a VAE of another factor."""
    return {int(number) for number in re.findall(r"\b(?:height|width) % (\d+) != 0", class_source(kind))}
