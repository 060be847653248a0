"""The best schedule for a number of computed steps, or for a quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from edit_compile.tuning.intervals import Costs, computed_pairs, interval_costs
from edit_compile.tuning.schedules import best_steps
from edit_compile.tuning.trials import Candidate, Trials

ORDERS = (0, 1)


class Search:
    """Schedules for `trials`: by dynamic programming over intervals, then by moving one computed step at a time.

    What dynamic programming adds up leaves out what the model gives for latents that are off; replays do not.
    """

    def __init__(self, trials: Trials, reach: int, rounds: int, advance: Callable[[], object]) -> None:
        self._trials, self._rounds = trials, rounds
        self._planned: Mapping[int, Mapping[int, tuple[int, ...]]] = {
            order: best_steps(_costs(trials, order, reach, advance)) for order in ORDERS
        }

    @staticmethod
    def work(steps: int, generations: int, reach: int) -> int:
        """How often `advance` is called."""
        return generations * sum(len(computed_pairs(steps, order, reach)) for order in ORDERS)

    def at(self, count: int) -> Candidate:
        """The best that was found with `count` computed steps."""
        best = max(self._begun(count), key=self._reached)
        for _ in range(self._rounds):
            better = max((best, *_moved(best, self._trials.steps)), key=self._reached)
            if better == best:
                break
            best = better
        return best

    def for_quality(self, decibels: float) -> Candidate | None:
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

    def _begun(self, count: int) -> Iterator[Candidate]:
        even = tuple(np.linspace(0, self._trials.steps, count, endpoint=False).round().astype(int).tolist())
        for order in ORDERS:
            yield Candidate(even, order)
            for planned in self._planned.values():
                if count in planned:
                    yield Candidate(planned[count], order)

    def _reached(self, candidate: Candidate) -> float:
        return self._trials.outcome(candidate).mean


def _moved(candidate: Candidate, steps: int) -> Iterator[Candidate]:
    """The candidate with one of its computed steps, but the first, moved by one."""
    for index, step in enumerate(candidate.computed[1:], start=1):
        for other in (step - 1, step + 1):
            if 0 < other < steps and other not in candidate.computed:
                moved = sorted({*candidate.computed[:index], other, *candidate.computed[index + 1 :]})
                yield Candidate(tuple(moved), candidate.order)


def _costs(trials: Trials, order: int, reach: int, advance: Callable[[], object]) -> Costs:
    found = []
    for generation, sampler, key in zip(trials.generations, trials.samplers, trials.keys, strict=True):
        make = partial(interval_costs, trials.compiled, generation, sampler, order, reach, advance)
        costs, there = trials.work.costs(key, order, reach, make)
        for _ in computed_pairs(trials.steps, order, reach) if there else ():
            advance()
        found.append(costs)
    total: Costs = np.sum(found, axis=0)
    return total
