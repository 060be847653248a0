"""The best steps to compute, by dynamic programming over intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edit_compile.tuning.intervals import Costs
from runtime.routing.policy import EXTRAPOLATE, REUSE
from runtime.routing.schedule import ScheduledPolicy


def best_steps(costs: Costs) -> dict[int, tuple[int, ...]]:
    """For each number of computed steps those that cost least, step 0 among them; what is not reached is left out.

    A path goes over pairs of computed steps (p, i), since what an interval costs depends on both.
    """
    steps = len(costs)
    first_order = bool(np.isfinite(costs[0, 1:]).any()) if steps > 1 else False
    least: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, (0,))}
    found: dict[int, tuple[int, ...]] = {}
    for count in range(1, steps + 1):
        ends = [(cost + costs[before, last, steps], chosen) for (before, last), (cost, chosen) in least.items()]
        total, chosen = min(ends, default=(np.inf, ()))
        if np.isfinite(total):
            found[count] = chosen
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (before, last), (cost, chosen) in least.items():
            for after in range(last + 1, steps):
                key = (last if first_order else after, after)
                reached = float(cost + costs[before, last, after]), (*chosen, after)
                if np.isfinite(reached[0]) and reached[0] < longer.get(key, (np.inf,))[0]:
                    longer[key] = reached
        least = longer
    return found


def schedule(computed: Sequence[int], steps: int, blocks: int, order: int) -> ScheduledPolicy:
    """A policy that computes all `blocks` in the steps `computed`, and reuses in the others, by residuals of `order`.

    Steps beyond `steps` are computed.
    """
    table = np.full((steps, blocks), EXTRAPOLATE if order else REUSE)
    table[list(computed)] = 1.0
    return ScheduledPolicy(table, routed=False, beyond="compute")
