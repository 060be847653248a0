"""What it costs in quality to reuse residuals for some steps on end, for all intervals between two computed steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edit_compile.calls.generations import CallsError, Generation
from edit_compile.calls.replaying import Placed, called
from edit_compile.calls.sampler import Sampler
from edit_compile.calls.stages import Stage
from edit_compile.tuning.influence import Influence
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import EXTRAPOLATE, REUSE
from runtime.routing.schedule import ScheduledPolicy

Costs = npt.NDArray[np.float64]
"""costs[p, i, k]: the squared error in the end of reusing from step i + 1 to step k - 1 what was computed in step i,
and before it in step p. Steps count from 0; k is their number where nothing is computed any more, p is i where i comes
first or the order is 0. Infinite where it is not known."""


@torch.no_grad()
def interval_costs(
    compiled: CompiledTransformer,
    generation: Generation,
    sampler: Sampler,
    order: int,
    reach: int,
    advance: Callable[[], object] = lambda: None,
) -> Costs:
    """Costs of intervals of up to `reach` steps, in which the model is given what was recorded.

    So a step's error is that of its residuals alone. `advance` is called once for each of `computed_pairs`.
    """
    influence, place = Influence.of(generation, sampler), sampler.place
    count = len(influence.stages)
    costs = np.full((count, count, count + 1), np.inf)
    for before, start in computed_pairs(count, order, reach):
        computed = [before, start] if before < start else [start]
        steps = [*computed, *range(start + 1, min(count, start + reach))]
        stages = [influence.stages[step] for step in steps]
        given = _given(compiled, generation, place.output, stages, _table(compiled, len(steps), len(computed), order))
        costs[before, start, start + 1], error = 0.0, [torch.zeros(1)] * len(influence.weights)
        for step, outputs in zip(steps, given, strict=True):
            if step <= start:
                continue
            off = {call: place.rows(now) - place.rows(generation.calls[call].outputs[place.output])
                   for call, now in outputs.items()}  # fmt: skip
            error = [a + b for a, b in zip(error, influence.error(off), strict=True)]
            costs[before, start, step + 1] = sum(float(one.square().sum()) for one in error)
        advance()
    return costs


def computed_pairs(steps: int, order: int, reach: int) -> list[tuple[int, int]]:
    """(p, i) of `interval_costs`."""
    if order == 0:
        return [(step, step) for step in range(steps)]
    return [(0, 0)] + [(before, step) for step in range(1, steps) for before in range(max(step - reach, 0), step)]


def _given(
    compiled: CompiledTransformer, generation: Generation, output: int, stages: Sequence[Stage], policy: ScheduledPolicy
) -> Iterator[dict[int, Tensor]]:
    """For each of `stages` what its recorded calls give, by call."""
    placed = Placed(compiled.device)
    with compiled.request(), compiled.decided_by(policy):
        for number, stage in enumerate(stages):
            outputs = {}
            for index in stage.calls:
                call = generation.calls[index]
                outputs[index] = called(compiled, placed.arguments(call), call.context)[output]
            _check_step(compiled, number)
            yield outputs


def _table(compiled: CompiledTransformer, steps: int, computed: int, order: int) -> ScheduledPolicy:
    """The first `computed` of `steps` are computed, those after them reused."""
    table = np.full((steps, len(compiled.program.manifest.blocks)), EXTRAPOLATE if order else REUSE)
    table[:computed] = 1.0
    return ScheduledPolicy(table, routed=False)


def _check_step(compiled: CompiledTransformer, number: int) -> None:
    """CallsError where the compiled transformer is at another step than the recorded generation."""
    step = int(compiled.trace[-1].arrays()["step"][-1])
    if step != number:
        raise CallsError(
            f"step {number} of the recorded generation is step {step} for the compiled transformer: samplers that "
            "repeat timesteps (Heun) are not tuned; where branches of guidance are called one after another, name them "
            "by cache_context while recording"
        )
