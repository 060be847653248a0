"""Which steps to compute, as far as products of errors tell it (see `intervals`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edit_compile.tuning.intervals import intervals
from runtime.routing.policy import EXTRAPOLATE, REUSE
from runtime.routing.schedule import ScheduledPolicy

BEND = 1.6
"""Exponent of the schedules a search begins at that compute more of the first steps."""


@dataclass(frozen=True, order=True)
class Schedule:
    """The steps that are `computed`, 0 among them, and, for each, the order of the residuals reused until the next.

    Order 0 reuses them as they are, order 1 extrapolates them from the last two computed; after step 0 it is 0.
    """

    computed: tuple[int, ...]
    orders: tuple[int, ...]

    @staticmethod
    def of(computed: tuple[int, ...], order: int) -> Schedule:
        """All intervals of one order."""
        return Schedule(computed, (0, *(order,) * (len(computed) - 1)))

    def policy(self, steps: int, blocks: int) -> ScheduledPolicy:
        """All `blocks` are computed in the steps `computed` and reused in others; those beyond `steps` are computed."""
        table = np.ones((steps, blocks))
        ends = (*self.computed[1:], steps)
        for start, end, order in zip(self.computed, ends, self.orders, strict=True):
            table[start + 1 : end] = EXTRAPOLATE if order else REUSE
        return ScheduledPolicy(table, routed=False, beyond="compute")

    def moved(self, steps: int, by: int) -> Iterator[Schedule]:
        """With the order of one interval changed, or one computed step moved by up to `by`; step 0 stays."""
        for index, step in enumerate(self.computed[1:], start=1):
            own = list(zip(self.computed, self.orders, strict=True))
            rest, order = [*own[:index], *own[index + 1 :]], self.orders[index]
            for other in range(max(step - by, 1), min(step + by, steps - 1) + 1):
                if other == step or other not in self.computed:
                    one = (other, 1 - order) if other == step else (other, order)
                    yield Schedule(*zip(*sorted([*rest, one]), strict=True))


def even(steps: int, count: int) -> tuple[int, ...]:
    """`count` of so many steps, spread evenly, the first among them."""
    return tuple(np.linspace(0, steps, count, endpoint=False).round().astype(int).tolist())


def predicted_best(
    products: npt.NDArray[np.float64], steps: int, reach: int, count: int, kept: float
) -> list[Schedule]:
    """Schedules with `count` computed steps that have the smallest errors, best first, each from another start.

    Products of two intervals count `kept` of what they are, from 0 to 1. All of it is what is right where the model is
    given what was recorded. A model that is given other latents corrects them in part, and forgets in which direction
    they were off: the more they are, the less two intervals have to do with one another.
    """
    predicted = Predicted(products, steps, reach, kept)
    found = {predicted.descended(Schedule.of(start, 1)) for start in _starts(steps, count)}
    return [schedule for error, schedule in sorted(found) if np.isfinite(error)]


class Predicted:
    """The squared errors of schedules, by products of the errors of their intervals (see `predicted_best`)."""

    def __init__(self, products: npt.NDArray[np.float64], steps: int, reach: int, kept: float) -> None:
        self.steps = steps
        self._products = kept * products + (1.0 - kept) * np.diag(np.diag(products))
        self._place = {interval: number for number, interval in enumerate(intervals(steps, reach))}

    def error(self, schedule: Schedule) -> float:
        """Of a schedule; infinite where it has a longer interval than is known."""
        ends = (*schedule.computed[1:], self.steps)
        befores = (0, *schedule.computed[:-1])
        places = []
        for before, start, end, order in zip(befores, schedule.computed, ends, schedule.orders, strict=True):
            if start + 1 < end:
                places.append(self._place.get((before if order else start, start, end), -1))
        if -1 in places:
            return np.inf
        return float(self._products[np.ix_(places, places)].sum())

    def descended(self, schedule: Schedule) -> tuple[float, Schedule]:
        """The best that one move after another leads to, and its error."""
        best = (self.error(schedule), schedule)
        while (
            better := min(((self.error(one), one) for one in best[1].moved(self.steps, self.steps)), default=best)
        ) < best:
            best = better
        return best


def _starts(steps: int, count: int) -> set[tuple[int, ...]]:
    """Even schedules, such with more of the first steps, and even ones from step 1, 2 or 3 to one of the last four."""
    spread = [even(steps, count), tuple((steps * np.linspace(0, 1, count, endpoint=False) ** BEND).round().astype(int))]
    if count > 1:
        spread += [(0, *np.linspace(first, last, count - 1).round().astype(int).tolist())
                   for first in (1, 2, 3) for last in range(steps - 4, steps)]  # fmt: skip
    return {_apart(one, steps) for one in spread}


def _apart(chosen: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """`chosen` with steps that are there twice, or are none, moved on."""
    apart = list[int]()
    for index, step in enumerate(chosen):
        least = apart[-1] + 1 if apart else 0
        apart.append(int(min(max(step, least), steps - (len(chosen) - index))))
    return tuple(apart)
