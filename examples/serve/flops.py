"""What one image of many took, from what was decided for its rows."""

from __future__ import annotations

from functools import cache

import numpy as np

from runtime.bundle.spec import Manifest
from runtime.requests.trace import COMPUTED, RequestTrace


class Share:
    """FLOPs of a request's rows beside those of the dense model, routers aside; for a bundle with one form of call."""

    def __init__(self, manifest: Manifest) -> None:
        (self._glue,) = manifest.glues
        plans = {plan.id: plan for plan in manifest.plans}
        costs = {(cost.plan, cost.variant): cost.flops for cost in self._glue.costs}
        self._plan_of = [plans[block.plan] for block in manifest.blocks]

        @cache
        def flops(block: int, width: float) -> int:
            plan = self._plan_of[block]
            return costs[plan.id, plan.variant_at(width)]

        self._flops = flops

    def of(self, trace: RequestTrace) -> float:
        """The share, 0 to 1."""
        columns = trace.arrays()
        blocks, widths = columns["block"].tolist(), columns["width"].tolist()
        computed = columns["done"] == COMPUTED
        done = sum(self._flops(blocks[i], widths[i]) for i in np.flatnonzero(computed))
        dense = sum(self._flops(block, 1.0) for block in blocks)
        glue = self._glue.flops * int((columns["block"] == 0).sum())
        return (done + glue) / (dense + glue)
