"""What reusing residuals for some steps on end puts into the result, for all intervals between two computed steps.

    error of a schedule = sum over its intervals of e(interval)
    its square          = sum over pairs of intervals of <e(a), e(b)>

Errors of neighbouring intervals point in like or opposite directions, so their products are needed and not their sizes
alone: regular schedules are better than the sizes tell, since what one interval adds the next takes off again.
"""

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

Products = npt.NDArray[np.float32]
"""(n, n): <e(a), e(b)> of `intervals`, in their order."""
Interval = tuple[int, int, int]
"""(p, i, k): steps i + 1 to k - 1 reuse what was computed in step i, extrapolated from what was in step p; as it was,
where p is i. Steps count from 0; k is their number where nothing is computed any more."""
SKETCH = 8192
"""Numbers that an error is kept in: longer ones are folded, each number added to one of them with a random sign, so
that products stay the same on average and within about 1% of the sizes multiplied (a count sketch)."""


def intervals(steps: int, reach: int) -> list[Interval]:
    """All intervals of up to `reach` steps in which something is reused."""
    return [
        (before, start, end)
        for before, start in computed_pairs(steps, reach)
        for end in range(start + 2, min(steps, start + reach) + 1)
    ]


def computed_pairs(steps: int, reach: int) -> list[tuple[int, int]]:
    """(p, i) of `intervals`, and of such in which nothing is reused."""
    return [(before, step) for step in range(steps) for before in range(max(step - reach, 0), step + 1)]


@torch.no_grad()
def error_products(
    compiled: CompiledTransformer,
    generation: Generation,
    sampler: Sampler,
    reach: int,
    advance: Callable[[], object] = lambda: None,
) -> Products:
    """Products of the errors of `intervals`, in which the model is given what was recorded.

    So a step's error is that of its residuals alone. `advance` is called once for each of `computed_pairs`.
    """
    influence, place = Influence.of(generation, sampler), sampler.place
    count = len(influence.stages)
    found = list[Tensor]()
    for before, start in computed_pairs(count, reach):
        computed = [before, start] if before < start else [start]
        steps = [*computed, *range(start + 1, min(count, start + reach))]
        stages = [influence.stages[step] for step in steps]
        given = _given(compiled, generation, place.output, stages, _table(compiled, len(steps), len(computed)))
        error = torch.zeros(())
        for step, outputs in zip(steps, given, strict=True):
            if step <= start:
                continue
            off = {call: place.rows(now) - place.rows(generation.calls[call].outputs[place.output])
                   for call, now in outputs.items()}  # fmt: skip
            error = error + _folded(torch.cat(influence.error(off)))
            found.append(error)
        advance()
    errors = torch.stack(found) if found else torch.zeros(0, 1)
    return (errors @ errors.T).numpy()


def _folded(error: Tensor) -> Tensor:
    """`error` (numbers,) in at most SKETCH numbers, the same way each time."""
    if len(error) <= SKETCH:
        return error.float()
    generator = torch.Generator().manual_seed(0)
    place = torch.randint(SKETCH, error.shape, generator=generator)
    sign = torch.randint(2, error.shape, generator=generator) * 2 - 1
    return torch.zeros(SKETCH).index_add_(0, place, error.float() * sign)


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


def _table(compiled: CompiledTransformer, steps: int, computed: int) -> ScheduledPolicy:
    """The first `computed` of `steps` are computed, those after them reused; extrapolated where two are computed."""
    table = np.full((steps, len(compiled.program.manifest.blocks)), EXTRAPOLATE if computed > 1 else REUSE)
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
