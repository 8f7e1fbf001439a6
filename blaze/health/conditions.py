"""Whether a model can be served, from its replicas and from what the deployment's controller says of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blaze.reports import ModelCondition, ReplicaState

_LONGEST = 300
# The last line of a traceback: "package.Error: what is wrong".
_RAISED = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Exit|Interrupt|Source|Problem))\b:?\s*(.*)$"
)


@dataclass(frozen=True, slots=True)
class DeploymentFacts:
    """What is said of a model's deployment by whoever starts and stops its replicas."""

    status: str  # Serve's: UPDATING, HEALTHY, UNHEALTHY, DEPLOY_FAILED, UPSCALING, DOWNSCALING
    message: str = ""
    replicas: int = 0  # in any state
    stopping: int = 0  # of them


def condition_of(
    model: str,
    states: Iterable[ReplicaState],
    facts: DeploymentFacts | None,
    *,
    given_up: Sequence[str] = (),
    crash_loops: Sequence[str] = (),
    slow_loads: Sequence[str] = (),
) -> ModelCondition:
    """``given_up``: why replicas of the model are not restarted any more; ``crash_loops``: of what they die
    again and again, one for each place where they do. Where there are other places, there is hope.
    ``slow_loads``: of replicas that should have been ready long ago."""
    count = Counter(states)
    failed = facts is not None and facts.status == "DEPLOY_FAILED"
    places = facts.replicas - facts.stopping if facts is not None else 0
    raised = _cause(facts.message) if facts is not None else None
    reason = detail = ""
    if raised is not None:
        name, detail = raised
        reason = f"{'replicas could' if failed else 'a replica could'} not be started ({name})"
        detail = f"{reason}: {detail}"[:_LONGEST] if detail else reason
    elif failed:
        reason = detail = "replicas could not be started"
    elif crash_loops:
        reason, detail = "replicas die or fail to load again and again", crash_loops[0]
    elif given_up:
        reason, detail = "replicas failed again and again, and are not restarted any more", given_up[0]
    elif slow_loads:
        reason, detail = "a replica takes very long to load", slow_loads[0]
    if count[ReplicaState.READY]:
        return ModelCondition(model, "ready", reason, detail)
    if failed or len(crash_loops) >= max(1, places) or (given_up and not count[ReplicaState.STARTING]):
        return ModelCondition(model, "failing", reason, detail)
    if not count and facts is not None and facts.status == "HEALTHY" and not facts.replicas:
        return ModelCondition(model, "idle")
    return ModelCondition(model, "loading", reason, detail)


def _cause(message: str) -> tuple[str, str] | None:
    """The name and the text of the exception in a message that holds a traceback."""
    for line in reversed(message.splitlines()):
        found = _RAISED.match(line.strip())
        if found:
            return found[1], " ".join(found[2].split())
    return None
