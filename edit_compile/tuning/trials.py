"""Whole generations replayed by policies: the quality they reach, and the work they do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edit_compile.calls.generations import CallsError, Generation
from edit_compile.calls.replaying import replay
from edit_compile.calls.result_quality import quality
from edit_compile.calls.sampler import Sampler
from edit_compile.tuning.fewer_steps import FewerSteps
from edit_compile.tuning.schedules import schedule
from runtime.face.transformer import CompiledTransformer
from runtime.routing.schedule import ScheduledPolicy

WORST = 20.0
"""dB that the compiled transformer reaches at least, all computed, if the recorded calls are its model's."""


@dataclass(frozen=True)
class Candidate:
    """A schedule: the steps that are computed, and the `order` of the residuals that are reused in others."""

    computed: tuple[int, ...]
    order: int


@dataclass(frozen=True)
class Outcome:
    """`decibels` of each generation, and the share of dense FLOPs that was done."""

    decibels: tuple[float, ...]
    flops_share: float

    @property
    def mean(self) -> float:
        """In dB."""
        return float(np.mean(self.decibels))


class Trials:
    """Replays of some generations of equally many steps by one compiled transformer."""

    def __init__(self, compiled: CompiledTransformer, generations: Sequence[Generation], samplers: Sequence[Sampler]):
        self.compiled, self.generations, self.samplers = compiled, tuple(generations), tuple(samplers)
        stages = [sampler.stages_of(generation) for generation, sampler in zip(generations, samplers, strict=True)]
        self.stages = [tuple(stage for stage in each if stage.calls) for each in stages]
        counts = {len(each) for each in self.stages}
        if len(counts) != 1:
            raise CallsError(f"the recorded generations have {sorted(counts)} steps: tune those of one number of steps")
        (self.steps,) = counts
        self.blocks = len(compiled.program.manifest.blocks)
        self._known: dict[Candidate, Outcome] = {}

    def policy(self, candidate: Candidate) -> ScheduledPolicy:
        """The policy of a candidate."""
        return schedule(candidate.computed, self.steps, self.blocks, candidate.order)

    def outcome(self, candidate: Candidate) -> Outcome:
        """What a candidate reaches; replayed once."""
        if candidate not in self._known:
            self._known[candidate] = self._replayed(candidate)
        return self._known[candidate]

    def fewer_steps(self, count: int) -> float:
        """Mean dB of sampling with `count` steps instead, all computed (see `FewerSteps`)."""
        found = []
        everything = self.policy(Candidate(tuple(range(self.steps)), 0))
        for generation, sampler, stages in zip(self.generations, self.samplers, self.stages, strict=True):
            with self.compiled.request(), self.compiled.decided_by(everything):
                model = FewerSteps(self.compiled, stages, count)
                found.append(quality(replay(model, generation, sampler), generation))
        return float(np.mean(found))

    def check_model(self) -> None:
        """CallsError where the compiled transformer does not give what was recorded, even if all is computed."""
        reached = self.outcome(Candidate(tuple(range(self.steps)), 0)).mean
        if reached < WORST:
            raise CallsError(
                f"computed in full, the recorded generations come out at {reached:.0f} dB of what was recorded: they "
                "are another model's, or of other weights"
            )

    def _replayed(self, candidate: Candidate) -> Outcome:
        before, found = self.compiled.counters, []
        with self.compiled.decided_by(self.policy(candidate)):
            for generation, sampler in zip(self.generations, self.samplers, strict=True):
                found.append(min(quality(replay(self.compiled, generation, sampler), generation), 200.0))
        after = self.compiled.counters
        share = (after.flops - before.flops) / max(after.dense_flops - before.dense_flops, 1)
        return Outcome(tuple(found), min(share, 1.0))


def prediction(decibels: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and the interval in which that of as many other generations lies with 95% confidence (Student's t)."""
    from scipy.stats import t

    values = np.asarray(decibels, dtype=np.float64)
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    reach = float(t.ppf(0.975, len(values) - 1)) * spread * math.sqrt(2 / len(values))
    return mean, mean - reach, mean + reach
