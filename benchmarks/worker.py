"""The inside of a contestant's process: a line of JSON says what to do, another what came of it.

Standard library only: it also runs in a rival's own virtual environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any


class Line:
    """Owns standard output; what libraries print there goes to standard error from here on."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, value: dict[str, Any]) -> None:
        self._out.write(json.dumps(value) + "\n")
        self._out.flush()

    def commands(self) -> Iterator[dict[str, Any]]:
        """Blocks between them, which costs nothing. Ends with standard input."""
        for line in sys.stdin:
            yield json.loads(line)
