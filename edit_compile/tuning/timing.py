"""How long recorded calls take at a tier, beside those of the dense model, on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from edit_compile.calls.replaying import Placed
from edit_compile.measuring.timing import Call, interleaved
from edit_compile.tuning.schedules import Schedule, even
from edit_compile.tuning.trials import Trials
from runtime.face.transformer import CompiledTransformer


@dataclass(frozen=True)
class Seconds:
    """Of the calls of one generation, medians: those of a tier, of the dense model beside it, and of as many steps of
    the dense model as the tier computes. `times_faster` is the median of dense / tier, each in one round."""

    tier: float
    dense: float
    fewer_steps: float
    times_faster: float


def seconds_of(trials: Trials, schedule: Schedule, repeats: int) -> Seconds:
    """Step by step in turns with the dense model, on the first generation."""
    runs = {"this": _calls(trials, "this", schedule), "dense": _calls(trials, "dense", trials.everything())}
    end = partial(_end, trials.compiled, list(runs))
    try:
        taken = interleaved(runs, repeats, 1, end)
    finally:
        end()
    this, dense = taken["this"].sum(1), taken["dense"].sum(1)
    fewer = taken["dense"][:, _in_steps(trials, even(trials.steps, len(schedule.computed)))].sum(1)
    return Seconds(*(float(np.median(one)) for one in (this, dense, fewer, dense / this)))


def _in_steps(trials: Trials, steps: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which calls of the first generation are in `steps`."""
    return np.array([number in steps for number, stage in enumerate(trials.stages[0]) for _ in stage.calls])


def _calls(trials: Trials, name: str, schedule: Schedule) -> list[Call]:
    compiled, policy, placed = trials.compiled, trials.policy(schedule), Placed(trials.compiled.device)

    def made(arguments: Mapping[str, object], context: str) -> None:
        with compiled.request(f"tuning {name}"), compiled.decided_by(policy), compiled.cache_context(context):
            compiled(**arguments)

    recorded, calls = trials.generations[0].calls, list[Call]()
    for stage in trials.stages[0]:
        for place, index in enumerate(stage.calls):
            call = recorded[index]
            calls.append(partial(made, placed.arguments(call), call.context or f"branch {place}"))
    return calls


def _end(compiled: CompiledTransformer, names: Sequence[str]) -> None:
    for name in names:
        with compiled.request(f"tuning {name}"):
            compiled.reset()
