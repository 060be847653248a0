"""Tiers of quality for a compiled transformer, found on recorded generations."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from edit_compile.calls.generations import Generation, Recording
from edit_compile.calls.result_quality import Mean, mean_quality
from edit_compile.measuring.machine import describe_machine, summary
from edit_compile.tuning.asked import check_tiers, split
from edit_compile.tuning.schedules import Schedule
from edit_compile.tuning.search import Search
from edit_compile.tuning.timing import Seconds, seconds_of
from edit_compile.tuning.trials import Trials
from edit_compile.tuning.tuned import Tuned
from runtime.base.errors import PolicyError
from runtime.bundle.tiers import Tier
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import Decider

BUDGETS = {"half": 0.5, "third": 0.36, "quarter": 0.25, "draft": 0.15}

Progress = Callable[[str, int, int], object]
"""Takes what is being done, how much of it is done, and how much there is."""


def tune(
    compiled: CompiledTransformer,
    recording: Sequence[Generation] | Recording,
    *,
    budget: Mapping[str, float] | None = None,
    quality: Mapping[str, float] | None = None,
    held_out: int | None = None,
    reach: int = 8,
    rounds: int = 0,
    repeats: int = 3,
    work: str | Path | None = None,
    progress: Progress = lambda *_: None,
) -> Tuned:
    """Find in which steps to compute and in which to reuse residuals, for each tier that is asked for.

    Schedules are proposed by what each interval of reuse puts into the result (`error_products`), and chosen by replays
    of whole generations. Routers and widths are left out: all blocks of a step are computed in full, or none.

    Args:
        compiled: what was recorded, compiled.
        recording: `Recording(folder)`, or generations, of one number of steps; at least 4.
        budget: share of the dense FLOPs, in (0, 1], by the tier's name; where no `quality` is given either, those of
            BUDGETS that a step can be computed for.
        quality: least mean PSNR in dB on the generations that are searched by, by the tier's name; a RuntimeWarning
            where those held out come out lower.
        held_out: generations that are not searched by: what tiers are predicted to reach is measured on them alone.
            Half of all where it is None.
        reach: steps between two computed ones that are looked at, at most.
        rounds: how often one computed step is moved by one if that is better; takes two replays for each of them.
        repeats: how often the held-out generation is timed by which `times_faster` is told.
        work: folder to keep what was found out in, so that a run that was killed goes on; made where it is missing.
            What belongs to a generation is taken up again where that is given again, for the same bundle and engine.
        progress: called as the work goes on.

    Raises:
        CallsError: too few generations, of other numbers of steps, of another model, or with NaN.
        PolicyError: `reach` below 2, `rounds` below 0 or `repeats` below 1, a tier without a name or with two, a budget
            outside (0, 1] or below what reuse itself costs, or a quality that is not reached; says the best there is.
        EditError: `work` holds the work of another bundle, or cannot be read.

    A RuntimeWarning where no result was recorded, or the sampler is explained badly (`Sampler.explained`), a
    UserWarning where plain sampling with fewer steps is better than a tier.
    """
    wanted, reached = dict(budget or {}) if budget or quality else dict(BUDGETS), dict(quality or {})
    check_tiers(wanted, reached)
    _check_numbers(reach, rounds, repeats)
    search_by, predict_by = split(compiled, recording, held_out, None if work is None else Path(work))
    search_by.check_model()
    total, done = Search.work(search_by.steps, len(search_by.generations), reach), itertools.count(1)
    search = Search(search_by, reach, rounds, lambda: progress("intervals", next(done), total))
    chosen: dict[str, Schedule] = {}
    for number, (name, share) in enumerate(wanted.items()):
        progress("budgets", number, len(wanted))
        if budget or _possible(search_by, share):
            chosen[name] = search.at(_steps_within(search_by, name, share))
    for number, (name, decibels) in enumerate(reached.items()):
        progress("qualities", number, len(reached))
        chosen[name] = _of_quality(search, search_by, name, decibels)
    tuned = _predicted(predict_by, chosen, repeats, partial(progress, "tiers on held-out generations"))
    for name, decibels in reached.items():
        _warn_of_quality(name, decibels, tuned.tiers[name].quality_db)
    if tuned.advice is not None:
        warnings.warn(tuned.advice, stacklevel=2)
    return tuned


def _predicted(
    trials: Trials, chosen: Mapping[str, Schedule], repeats: int, progress: Callable[[int, int], object]
) -> Tuned:
    """What the candidates reach on generations that they were not searched by."""
    tiers, fewer, gain = dict[str, Tier[Decider]](), dict[str, Mean](), dict[str, Mean]()
    seconds, in_time, timed = {}, {}, dict[Schedule, Seconds]()
    machine = summary(describe_machine())
    progress(0, len(chosen))
    for name, schedule in chosen.items():  # one after another, so that no more is held in memory than by two requests
        outcome = trials.outcome(schedule)
        if schedule not in timed:
            timed[schedule] = seconds_of(trials, schedule, repeats)
        mean, seconds[name] = mean_quality(outcome.decibels), timed[schedule]
        in_time[name] = _steps_in_time(trials.steps, len(schedule.computed), seconds[name].times_faster)
        others = trials.fewer_steps(in_time[name])
        tiers[name] = Tier(
            trials.policy(schedule),
            mean.value,
            (mean.low, mean.high),
            seconds[name].times_faster,
            outcome.flops_share,
            trials.steps,
            machine,
        )
        fewer[name] = mean_quality(trials.fewer_steps(len(schedule.computed)))
        gain[name] = mean_quality([own - other for own, other in zip(outcome.decibels, others, strict=True)])
        progress(len(tiers), len(chosen))
    counts = {name: len(schedule.computed) for name, schedule in chosen.items()}
    return Tuned(tiers, counts, fewer, in_time, gain, seconds)


def _check_numbers(reach: object, rounds: object, repeats: object) -> None:
    for name, value, least in (("reach", reach, 2), ("rounds", rounds, 0), ("repeats", repeats, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise PolicyError(f"{name} is a whole number of at least {least}, not {value!r}")


def _steps_in_time(steps: int, computed: int, times_faster: float) -> int:
    """How many of the dense model's `steps` take as long as a tier, which takes at least that of those it computes."""
    return min(max(computed, int(steps / times_faster)), steps)


def _warn_of_quality(name: str, wanted: float, reached: float | None) -> None:
    if reached is not None and reached < wanted:
        warnings.warn(
            f"tier {name!r} reaches {wanted:g} dB on the generations that were searched by, and {reached:.1f} on "
            "those held out: ask for more, or record more generations",
            RuntimeWarning,
            stacklevel=3,
        )


def _possible(trials: Trials, share: float) -> bool:
    """Whether a step can be computed for a share of the dense FLOPs."""
    return share >= trials.outcome(Schedule.of((0,), 0)).flops_share


def _steps_within(trials: Trials, name: str, share: float) -> int:
    """How many steps may be computed for a share of the dense FLOPs."""
    least = trials.outcome(Schedule.of((0,), 0)).flops_share
    a_step = (1.0 - least) / max(trials.steps - 1, 1)
    count = 1 + int((share - least) / a_step + 1e-6) if share >= least else 0
    if count < 1:
        raise PolicyError(f"budget[{name!r}] is {share:.0%} of the dense FLOPs: one computed step takes {least:.0%}")
    return min(count, trials.steps)


def _of_quality(search: Search, trials: Trials, name: str, decibels: float) -> Schedule:
    found = search.for_quality(decibels)
    if found is None:
        best = trials.outcome(search.at(trials.steps - 1))
        raise PolicyError(
            f"quality[{name!r}] is {decibels:g} dB: the best that reuse reaches here is {best.mean:.1f} dB, at "
            f"{best.flops_share:.0%} of the dense FLOPs"
        )
    return found
