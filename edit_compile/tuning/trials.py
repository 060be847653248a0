"""Whole generations replayed by policies: the quality they reach, and the work they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edit_compile.calls.generations import CallsError, Generation
from edit_compile.calls.replaying import replay
from edit_compile.calls.result_quality import quality
from edit_compile.calls.sampler import Sampler
from edit_compile.tuning.fewer_steps import FewerSteps
from edit_compile.tuning.schedules import Schedule
from edit_compile.tuning.work import Replay, Work
from runtime.base.errors import InputError
from runtime.face.transformer import CompiledTransformer
from runtime.routing.schedule import ScheduledPolicy

BEST = 200.0
"""dB that stand for what was recorded itself."""
WORST = 20.0
"""dB that the compiled transformer reaches at least, all computed, if the recorded calls are its model's."""


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
    """Replays of some generations of equally many steps by one compiled transformer; `work` keeps what they give."""

    def __init__(
        self,
        compiled: CompiledTransformer,
        generations: Sequence[Generation],
        samplers: Sequence[Sampler],
        work: Work,
    ) -> None:
        self.compiled, self.generations, self.samplers = compiled, tuple(generations), tuple(samplers)
        self.work, self.keys = work, tuple(map(work.key, self.generations))
        stages = [sampler.stages_of(generation) for generation, sampler in zip(generations, samplers, strict=True)]
        self.stages = [tuple(stage for stage in each if stage.calls) for each in stages]
        counts = {len(each) for each in self.stages}
        if len(counts) != 1:
            raise CallsError(f"the recorded generations have {sorted(counts)} steps: tune those of one number of steps")
        (self.steps,) = counts
        self.blocks = len(compiled.program.manifest.blocks)

    def everything(self) -> Schedule:
        """All steps computed."""
        return Schedule.of(tuple(range(self.steps)), 0)

    def policy(self, schedule: Schedule) -> ScheduledPolicy:
        """The policy of a schedule."""
        return schedule.policy(self.steps, self.blocks)

    def outcome(self, schedule: Schedule) -> Outcome:
        """What a schedule reaches."""
        orders = "".join(map(str, schedule.orders))
        name = f"steps {' '.join(map(str, schedule.computed))} of {self.steps}, orders {orders}"
        replays = self._replays(name, self.policy(schedule), lambda _: self.compiled)
        share = sum(one.flops for one in replays) / max(sum(one.dense_flops for one in replays), 1)
        return Outcome(tuple(one.decibels for one in replays), min(share, 1.0))

    def fewer_steps(self, count: int) -> tuple[float, ...]:
        """dB of each generation where it is sampled with `count` steps instead, all computed (see `FewerSteps`)."""
        replays = self._replays(
            f"{count} steps instead of {self.steps}",
            self.policy(self.everything()),
            lambda number: FewerSteps(self.compiled, self.stages[number], count),
        )
        return tuple(one.decibels for one in replays)

    def check_model(self) -> None:
        """CallsError where the compiled transformer does not give what was recorded, even if all is computed."""
        try:
            reached = self.outcome(self.everything()).mean
        except InputError as error:
            raise CallsError(
                f"what is compiled does not take the recorded calls, compile it for them (edit-compile compile --calls "
                f"or inputs=Recording(folder)): {error}"
            ) from error
        if reached < WORST:
            raise CallsError(
                f"computed in full, the recorded generations come out at {reached:.0f} dB of what was recorded: they "
                "are another model's, or of other weights"
            )

    def _replays(self, name: str, policy: ScheduledPolicy, model: Callable[[int], Callable[..., Any]]) -> list[Replay]:
        """Each generation's replay by `model(number)`, decided by `policy`; made once."""

        def made(number: int) -> Replay:
            generation, sampler, before = self.generations[number], self.samplers[number], self.compiled.counters
            with self.compiled.request(), self.compiled.decided_by(policy):
                reached = quality(replay(model(number), generation, sampler), generation)
            after = self.compiled.counters
            return Replay(min(reached, BEST), after.flops - before.flops, after.dense_flops - before.dense_flops)

        return [self.work.replay(key, name, partial(made, number)) for number, key in enumerate(self.keys)]
