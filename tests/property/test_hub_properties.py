"""Whatever comes, leaves and fails: every call ends once, in time, and no forward is too large."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from blaze.errors import Cancelled
from tests.hub_bench import Caller, HubBench

MAX_IMAGES = 6


@dataclass(frozen=True)
class Plan:
    steps: int
    images: int
    side: int  # calls of different sides cannot be joined
    comes_at: int
    leaves_after: int | None  # forwards that it has seen
    image_leaves_after: int | None  # the first of its images, where it has others
    blocks: int
    fails: bool


plans = st.builds(
    Plan,
    steps=st.integers(0, 6),
    images=st.integers(1, 4),
    side=st.integers(1, 3),
    comes_at=st.integers(0, 8),
    leaves_after=st.none() | st.integers(0, 4),
    image_leaves_after=st.none() | st.integers(0, 4),
    blocks=st.integers(1, 2),
    fails=st.booleans(),
)


def leave(caller: Caller, plan: Plan) -> None:
    """If it is time."""
    if plan.leaves_after is not None and len(caller.waits) >= plan.leaves_after:
        caller.reason = Cancelled("left")
    if plan.image_leaves_after is not None and len(caller.waits) >= plan.image_leaves_after:
        caller.left = {0} if plan.images > 1 else set()


@given(st.lists(plans, max_size=8), st.sampled_from([None, 4]))
def test_every_call_ends_once_and_in_time(crowd: list[Plan], fixed_rows: int | None) -> None:
    bench = HubBench(max_images=MAX_IMAGES, fixed_rows=fixed_rows)
    callers = [
        Caller(number, plan.steps, images=plan.images, side=plan.side, blocks=plan.blocks)
        for number, plan in enumerate(crowd, start=1)
    ]
    guilty = {number for number, plan in enumerate(crowd, start=1) if plan.fails}

    def fail(numbers: list[int]) -> None:
        if guilty & {*numbers}:
            raise ValueError("guilty")

    bench.module.before = fail
    for turn in range(200):
        for caller, plan in zip(callers, crowd, strict=True):
            if plan.comes_at == turn:
                bench.start(caller)
            leave(caller, plan)
        bench.step()
    assert bench.hub.num_waiting == 0
    for caller, plan in zip(callers, crowd, strict=True):
        assert len(caller.ends) == 1
        (end,) = caller.ends
        leaves = plan.leaves_after is not None and plan.leaves_after < plan.steps
        if plan.fails and plan.steps and plan.leaves_after != 0:
            assert isinstance(end, ValueError)
        elif leaves:
            assert isinstance(end, Cancelled)
        else:
            assert end is None
            assert len(caller.waits) == plan.steps
        # Each turn runs the call that waits longest: at worst, all others come first, once.
        assert all(wait <= len(crowd) for wait in caller.waits)
    most = max([MAX_IMAGES, *(plan.images for plan in crowd)])
    limit = fixed_rows or most * max((plan.blocks for plan in crowd), default=1)
    assert all(len(batch) <= limit for batch in bench.batches)
