"""The best schedule for a number of computed steps, or for a quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from edit_compile.tuning.intervals import computed_pairs, error_products, intervals
from edit_compile.tuning.schedules import Schedule, even, predicted_best
from edit_compile.tuning.trials import Trials

KEPT = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How much of the products of two intervals counts (see `predicted_best`): each proposes schedules, replays choose."""
PROPOSED = 2
"""How many of each are replayed."""


class Search:
    """Schedules for `trials`: proposed by the errors of their intervals, chosen by replays.

    What errors of intervals add up to leaves out what the model gives for latents that are off; replays do not.
    """

    def __init__(self, trials: Trials, reach: int, rounds: int, advance: Callable[[], object]) -> None:
        self._trials, self._reach, self._rounds = trials, reach, rounds
        self._products = _products(trials, reach, advance)

    @staticmethod
    def work(steps: int, generations: int, reach: int) -> int:
        """How often `advance` is called."""
        return generations * len(computed_pairs(steps, reach))

    def at(self, count: int) -> Schedule:
        """The best that was found with `count` computed steps."""
        best = max(dict.fromkeys(self._begun(count)), key=self._reached)
        for _ in range(self._rounds):
            better = max((best, *best.moved(self._trials.steps, 1)), key=self._reached)
            if better == best:
                break
            best = better
        return best

    def for_quality(self, decibels: float) -> Schedule | None:
        """The one with the fewest computed steps that reaches so many dB; None where none does but computing all."""
        low, high, found = 1, self._trials.steps - 1, None
        while low <= high:
            count = (low + high) // 2
            best = self.at(count)
            if self._reached(best) >= decibels:
                found, high = best, count - 1
            else:
                low = count + 1
        return found

    def _begun(self, count: int) -> Iterator[Schedule]:
        steps = self._trials.steps
        for order in (0, 1):
            yield Schedule.of(even(steps, count), order)
        for kept in KEPT:
            yield from predicted_best(self._products, steps, self._reach, count, kept)[:PROPOSED]

    def _reached(self, schedule: Schedule) -> float:
        return self._trials.outcome(schedule).mean


def _products(trials: Trials, reach: int, advance: Callable[[], object]) -> npt.NDArray[np.float64]:
    """Those of all generations, added up."""
    pairs, count = computed_pairs(trials.steps, reach), len(intervals(trials.steps, reach))
    total = np.zeros((count, count))
    for generation, sampler, key in zip(trials.generations, trials.samplers, trials.keys, strict=True):
        make = partial(error_products, trials.compiled, generation, sampler, reach, advance)
        products, there = trials.work.products(key, reach, count, make)
        for _ in pairs if there else ():
            advance()
        total += products
    return total
