"""A call of a compiled transformer whose decisions are taken on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from runtime.base.guard import answering
from runtime.base.transfer import to_host
from runtime.bundle.spec import Glue
from runtime.calls.dispatch import Dispatch
from runtime.calls.loaded import Loaded
from runtime.requests.state import Request, Requests, Signature, current_context
from runtime.requests.trace import Counters, Trace
from runtime.routing.policy import Decider

T = TypeVar("T")


class HostRunner:
    """Answers guards one after another; traces go to `traces`."""

    def __init__(self, traces: Trace) -> None:
        self.requests = Requests(lambda name: Request(name, traces))

    def __call__(
        self,
        loaded: Loaded,
        glue: Glue,
        shapes: Signature,
        timestep: Tensor,
        policy: Decider,
        run: Callable[[], T],
        count: Callable[[Counters, int], None],
    ) -> T:
        """What `run` gives, its guards answered by `policy`; `count` is told the work done, and the rows.

        `shapes` are those of the call's tensors. The timestep is read here, which waits for a GPU.
        """
        times = tuple(to_host(timestep.reshape(-1)))
        with self.requests.held() as request:
            branch = request.enter(times, current_context(), (glue.id, *shapes))
            assert request.trace is not None
            dispatch = Dispatch(
                loaded.blocks,
                policy,
                branch,
                request.step,
                request.trace,
                timestep.to(loaded.device),
                loaded.costs[glue.id],
                copies=glue.file is None,
            )
            with answering(dispatch):
                result = run()
        count(dispatch.counters(), dispatch.rows)
        return result
