"""The work of one forward call, counted block by block."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.bundle.spec import Cost
from runtime.calls.bound import ReadyBlock
from runtime.requests.trace import Counters
from runtime.routing.policy import REUSE, SKIP

Costs = Mapping[tuple[str, int], Cost]


class Tally:
    """Counts what is done with rows of blocks, with their `costs` by (plan id, variant); the glue is not counted."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._guards = self._engine_calls = self._flops = self._bytes = self._dense_flops = 0
        self._rows = {SKIP: 0, REUSE: 0, 1.0: 0}

    def guard(self) -> None:
        """A block was asked for."""
        self._guards += 1

    def left(self, ready: ReadyBlock, decision: float, rows: int) -> None:
        """`rows` were skipped, or reused, as `decision` says."""
        self._rows[decision] += rows
        self._dense(ready, rows)

    def computed(self, ready: ReadyBlock, variant: int, rows: int) -> None:
        """`rows` were computed together by a variant of the block's plan."""
        self._rows[1.0] += rows
        self._dense(ready, rows)
        calls = ready.calls(rows)
        self._engine_calls += calls
        done = self._costs.get((ready.plan.id, variant))
        if done is not None:
            self._flops += rows * done.flops
            self._bytes += calls * done.weight_bytes + rows * done.row_bytes

    def counters(self) -> Counters:
        """What was counted so far, as one call."""
        return Counters(
            calls=1,
            guards=self._guards,
            engine_calls=self._engine_calls,
            skipped=self._rows[SKIP],
            reused=self._rows[REUSE],
            computed=self._rows[1.0],
            flops=self._flops,
            bytes=self._bytes,
            dense_flops=self._dense_flops,
        )

    def _dense(self, ready: ReadyBlock, rows: int) -> None:
        dense = self._costs.get((ready.plan.id, len(ready.plan.variants) - 1))
        if dense is not None:
            self._dense_flops += rows * dense.flops
