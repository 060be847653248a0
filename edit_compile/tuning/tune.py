"""Tiers of quality for a compiled transformer, found on recorded generations."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from edit_compile.calls.generations import CallsError, Generation
from edit_compile.calls.place import latents_of
from edit_compile.calls.replaying import Placed
from edit_compile.calls.sampler import Sampler
from edit_compile.measuring.machine import describe_machine, summary
from edit_compile.measuring.timing import Call, interleaved
from edit_compile.tuning.search import Search
from edit_compile.tuning.trials import Candidate, Trials, prediction
from runtime.base.errors import PolicyError
from runtime.bundle.tiers import Tier
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import Decider

LEAST = 4
"""Generations that tuning needs: two to search by, two to predict by."""
BUDGETS = {"half": 0.5, "third": 0.36, "quarter": 0.25, "draft": 0.15}

Progress = Callable[[str, int, int], object]
"""Takes what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Tuned:
    """Tiers by name; of each the number of steps it computes, and the mean dB of sampling with so many instead."""

    tiers: Mapping[str, Tier[Decider]]
    computed_steps: Mapping[str, int]
    fewer_steps: Mapping[str, float]

    def add_to(self, compiled: CompiledTransformer) -> None:
        """Give `compiled` the tiers; `compiled.save` writes them into the bundle."""
        for name, tier in self.tiers.items():
            compiled.add_tier(name, tier)


def tune(
    compiled: CompiledTransformer,
    recording: Sequence[Generation],
    *,
    budget: Mapping[str, float] | None = None,
    quality: Mapping[str, float] | None = None,
    held_out: int | None = None,
    reach: int = 8,
    rounds: int = 0,
    repeats: int = 3,
    progress: Progress = lambda *_: None,
) -> Tuned:
    """Find in which steps to compute and in which to reuse residuals, for each tier that is asked for.

    Which steps are best is first told by what each interval of reuse costs on its own (`interval_costs`), by dynamic
    programming; then by replays of whole generations. Routers are left out: all blocks of a step are computed, or none.

    Args:
        compiled: what was recorded, compiled.
        recording: `Recording(folder)`, or generations, of one number of steps; at least 4.
        budget: share of the dense FLOPs, by the tier's name; BUDGETS where neither it nor `quality` is given.
        quality: least mean PSNR in dB on the generations that are searched by, by the tier's name; a RuntimeWarning
            where those held out come out lower.
        held_out: generations that are not searched by: what tiers are predicted to reach is measured on them alone.
            Half of all where it is None.
        reach: steps between two computed ones that are looked at, at most.
        rounds: how often one computed step is moved by one if that is better; takes two replays for each of them.
        repeats: how often the held-out generation is timed by which `times_faster` is told.
        progress: called as the work goes on.

    Raises:
        CallsError: too few generations, of other numbers of steps, or of another model.
        PolicyError: a budget below what reuse itself costs, or a quality that is not reached; says the best there is.
    """
    wanted = dict(budget or {}) if budget or quality else dict(BUDGETS)
    search_by, predict_by = _split(compiled, list(recording), held_out)
    search_by.check_model()
    total, done = Search.work(search_by.steps, len(search_by.generations), reach), itertools.count(1)
    search = Search(search_by, reach, rounds, lambda: progress("intervals", next(done), total))
    chosen: dict[str, Candidate] = {}
    for number, (name, share) in enumerate(wanted.items()):
        progress("budgets", number, len(wanted))
        chosen[name] = search.at(_steps_within(search_by, name, share))
    for number, (name, decibels) in enumerate((quality or {}).items()):
        progress("qualities", number, len(quality or {}))
        chosen[name] = _of_quality(search, search_by, name, decibels)
    progress("held-out generations", 0, len(chosen))
    faster = _times_faster(predict_by, chosen, repeats)
    tiers = {name: _tier(predict_by, candidate, faster[name]) for name, candidate in chosen.items()}
    for name, decibels in (quality or {}).items():
        reached = tiers[name].quality_db
        if reached is not None and reached < decibels:
            warnings.warn(
                f"tier {name!r} reaches {decibels:g} dB on the generations that were searched by, and {reached:.1f} on "
                "those held out: ask for more, or record more generations",
                RuntimeWarning,
                stacklevel=2,
            )
    counts = {name: len(candidate.computed) for name, candidate in chosen.items()}
    return Tuned(tiers, counts, {name: predict_by.fewer_steps(count) for name, count in counts.items()})


def _split(compiled: CompiledTransformer, generations: list[Generation], held_out: int | None) -> tuple[Trials, Trials]:
    """Generations to search by, and others to predict by."""
    apart = len(generations) // 2 if held_out is None else held_out
    if len(generations) < LEAST or not 2 <= apart <= len(generations) - 2:
        raise CallsError(
            f"recording: {len(generations)} generations, of which held_out={apart}: tuning needs two to search by and "
            "two held out; record more"
        )
    fitted = [Sampler.fit(generation, *latents_of(compiled)) for generation in generations]
    parts = slice(None, -apart), slice(-apart, None)
    searched, predicted = (Trials(compiled, generations[part], fitted[part]) for part in parts)
    if searched.steps != predicted.steps:
        raise CallsError(f"the recorded generations have {searched.steps} and {predicted.steps} steps: tune one number")
    return searched, predicted


def _steps_within(trials: Trials, name: str, share: float) -> int:
    """How many steps may be computed for a share of the dense FLOPs."""
    if not 0.0 < share < 1.0:
        raise PolicyError(f"budget[{name!r}] is a share of the dense FLOPs between 0 and 1, not {share!r}")
    least = trials.outcome(Candidate((0,), 0)).flops_share
    a_step = (1.0 - least) / max(trials.steps - 1, 1)
    count = 1 + int((share - least) / a_step + 1e-6) if share >= least else 0
    if count < 1:
        raise PolicyError(f"budget[{name!r}] is {share:.0%} of the dense FLOPs: one computed step takes {least:.0%}")
    return min(count, trials.steps - 1)


def _of_quality(search: Search, trials: Trials, name: str, decibels: float) -> Candidate:
    found = search.for_quality(decibels)
    if found is None:
        best = trials.outcome(search.at(trials.steps - 1)).mean
        raise PolicyError(f"quality[{name!r}] is {decibels:g} dB: the best that reuse reaches here is {best:.1f} dB")
    return found


def _tier(trials: Trials, candidate: Candidate, faster: float) -> Tier[Decider]:
    outcome = trials.outcome(candidate)
    mean, low, high = prediction(outcome.decibels)
    machine = summary(describe_machine())
    return Tier(trials.policy(candidate), mean, (low, high), faster, outcome.flops_share, trials.steps, machine)


def _times_faster(trials: Trials, chosen: Mapping[str, Candidate], repeats: int) -> dict[str, float]:
    """Time of the dense model / that of each candidate, step by step in turns, on the first generation.

    One candidate after another, so that no more is held in memory than by two requests.
    """
    dense, found = _calls(trials, "dense", Candidate(tuple(range(trials.steps)), 0)), {}
    for name, candidate in chosen.items():
        runs = {"this": _calls(trials, "this", candidate), "dense": dense}
        end = partial(_end, trials.compiled, list(runs))
        try:
            seconds = interleaved(runs, repeats, 1, end)
        finally:
            end()
        found[name] = float(np.median(seconds["dense"].sum(1) / seconds["this"].sum(1)))
    return found


def _calls(trials: Trials, name: str, candidate: Candidate) -> list[Call]:
    compiled, policy, placed = trials.compiled, trials.policy(candidate), Placed(trials.compiled.device)

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
