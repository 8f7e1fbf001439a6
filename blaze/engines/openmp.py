"""How the math threads of a replica wait for work, decided before their runtime is loaded."""

from __future__ import annotations

import os
import sys


def share_cores() -> None:
    """Let idle math threads sleep instead of spinning, unless the environment says otherwise.

    Replicas share cores. A thread that spins for work takes them from the threads that have some: on two
    cores, beside other busy processes, a step of 10 ms was seen to take 0.9 s, and 13 ms with this. The
    runtime reads it when it is loaded, with torch.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
