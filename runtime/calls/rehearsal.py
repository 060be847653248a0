"""A call without its blocks: what its arguments are refused for in its course is told before a request is touched."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from runtime.base.guard import answering, refuse_unless
from runtime.bundle.spec import Glue
from runtime.calls.bound import BoundBlocks
from runtime.calls.dispatch import Dispatch
from runtime.calls.rows import nobodys
from runtime.requests.sighting import Sighting
from runtime.routing.policy import SKIP


def rehearse(
    blocks: BoundBlocks,
    glue: Glue,
    seen: Sighting,
    requests: int,
    grow: Callable[[], None] | None,
    run: Callable[[], object],
) -> bool:
    """Whether a call looks at values of its inputs: that of `run`, shared by so many requests, with all blocks skipped.

    Raises what it raises.
    """
    looked: list[str] = []

    def check(right: Tensor, told: str) -> None:
        looked.append(told)
        refuse_unless(right, told)

    with answering(Dispatch(blocks, [nobodys(seen, len(blocks), SKIP)] * requests, seen.timestep, glue, grow), check):
        run()
    return bool(looked)
