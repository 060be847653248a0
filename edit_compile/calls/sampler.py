"""What a sampler does, told from a recorded generation alone.

It makes its next latents from the last ones and from what the model gave:

    x' = a x + b_1 v_1 + ... + b_m v_m + r

with outputs of guidance's branches, of joined rows of a batch and of earlier steps among the v, and latents of earlier
steps beside x (samplers of a higher order). a and b are scalars, for each step and row, and are fitted to the recorded
numbers by least squares. r is what the sum does not explain: added noise, clipping, rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edit_compile.calls.generations import CallsError, Generation
from edit_compile.calls.place import Place, place_of
from edit_compile.calls.stages import Stage, stages_of

EARLIER = 3
"""Earlier steps whose outputs and latents the next latents may be made of."""
GAIN = 0.1
"""Part of the squared remainder that an earlier step has to explain, or it is left out."""
NUMBERS = 8
"""Each scalar needs so many numbers of the latents, and explains at least its share of the remainder so many times."""
NEGLIGIBLE = 1e-7
"""Of the latents' length: a remainder that small is not looked into, whatever their dtype."""
RCOND = 1e-6
"""Directions of the columns, each of length 1, that are shorter than that part of the longest are rounding."""
EXPLAINED = 0.5
"""Part of what a step moves; where less of it is explained, a warning says so."""
SAMPLE = 1 << 18
"""Numbers of a row that scalars are fitted to."""


@dataclass(frozen=True)
class Term:
    """`factor` times what moves of row `row` of a call's latents, or, if `given`, of its output."""

    call: int
    row: int
    given: bool
    factor: float = 0.0


@dataclass(frozen=True)
class Step:
    """How one stage's latents, or the result, are made: the terms of each group.

    `explained` is the part of |x' - x|^2 that the sum explains, in [0, 1].
    """

    groups: tuple[tuple[Term, ...], ...]
    explained: float


@dataclass(frozen=True)
class Sampler:
    """A sampler as one generation shows it: a step for each change of its latents, and one for its result if recorded.

    Only the generation it was fitted to, or one with the same calls in the same schedule, can be replayed with it.
    """

    place: Place
    steps: tuple[Step, ...]

    @classmethod
    def fit(cls, generation: Generation, latents: str | None = None, output: int | None = None) -> Sampler:
        """The sampler that made `generation`.

        Args:
            generation: of at least two steps; all numbers finite, as `record` writes them.
            latents: dotted name of the argument that the sampler advances; found by shapes where it is not given
                (`latents_of(compiled)` gives it and `output` by a compiled transformer's manifest).
            output: position of the output that it is advanced by.

        What of the latents never moves (an image beside them), and what the output has no part of, is not advanced.
        Look at `explained`: what the sum does not explain is replayed as it was recorded.

        Raises:
            CallsError (an EditError): the latents are not found, are several arguments, or change their shape; there
                is one call or one step only; the recorded result has not the shape of the latents.
        """
        place = place_of(generation, latents, output)
        stages = stages_of(generation, place)
        return cls(place, tuple(_step(generation, place, stages, number) for number in range(1, len(stages))))

    def stages_of(self, generation: Generation) -> tuple[Stage, ...]:
        """The stages of `generation`; CallsError where it has not the calls, rows and steps that the sampler has."""
        stages = stages_of(generation, self.place)
        called = [stage for stage in stages if stage.calls]
        known = {member for stage in called for group in range(len(stage.distinct)) for member in stage.members(group)}
        needed = {(term.call, term.row) for step in self.steps for terms in step.groups for term in terms}
        if [len(stage.distinct) for stage in stages[1:]] != [len(step.groups) for step in self.steps] or needed - known:
            raise CallsError("the sampler was fitted to a generation of other steps: Sampler.fit(generation)")
        return stages

    @property
    def explained(self) -> tuple[float, ...]:
        """Of each step the part of |x' - x|^2 that is explained: 1, but for rounding, where nothing else is added."""
        return tuple(step.explained for step in self.steps)


def warn_of_unexplained(samplers: Sequence[Sampler]) -> None:
    """A RuntimeWarning where some generation's sampler does more than is known of it."""
    least, number = min((min(sampler.explained), number) for number, sampler in enumerate(samplers))
    if least < EXPLAINED:
        step = samplers[number].explained.index(least)
        warnings.warn(
            f"recording[{number}]: of step {step} of its sampler only {least:.0%} is explained by what the model gave: "
            "unless the rest is noise that the sampler adds, do not trust what is told or learned from it",
            RuntimeWarning,
            stacklevel=5,
        )


def _step(generation: Generation, place: Place, stages: Sequence[Stage], number: int) -> Step:
    """How stage `number` is made of those before it."""
    groups, moved, left = [], 0.0, 0.0

    def values(term: Term) -> Tensor:
        call = generation.calls[term.call]
        tensor = call.outputs[place.output] if term.given else place.latents_of(call)
        return _sample(place.rows(tensor[term.row : term.row + 1])[0])

    for group, whole in enumerate(stages[number].distinct):
        target = _sample(whole)
        origin = stages[number].origins(stages[number - 1])[group]
        terms, remainder = _explained(target, list(_candidates(stages, number, group)), values)
        groups.append(terms)
        moved += float((target - _sample(stages[number - 1].distinct[origin])).square().sum())
        left += remainder
    return Step(tuple(groups), 1.0 - min(left / moved, 1.0) if moved else 1.0)


def _sample(row: Tensor) -> Tensor:
    return row[:: -(-len(row) // SAMPLE) | 1]  # odd, so that it meets all channels


def _candidates(stages: Sequence[Stage], number: int, group: int) -> Iterator[list[Term]]:
    """What may explain latents, in the order in which it is tried: this step, then earlier ones, latents last."""
    for back in range(EARLIER + 1):
        now, number = stages[number], number - 1
        if number < 0:
            return
        group = now.origins(stages[number])[group]
        members = stages[number].members(group)
        # of equal outputs the later one is taken, so they come first
        outputs = [Term(call, row, given=True) for call, row in reversed(members)]
        latents = [Term(*members[0], given=False)]
        if back == 0:
            yield latents + outputs
        else:
            yield outputs
            yield latents


def _explained(
    target: Tensor, candidates: Sequence[Sequence[Term]], values: Callable[[Term], Tensor]
) -> tuple[tuple[Term, ...], float]:
    """The smallest set of candidates that explains `target`, with factors; and the squared length of what is left."""
    terms: list[Term] = []
    columns: list[Tensor] = []
    best: tuple[tuple[Term, ...], float, int] | None = None
    for more in candidates:
        for term in more:
            column = values(term)
            if column.any() and not any(torch.equal(column, known) for known in columns):
                terms.append(term)
                columns.append(column)
        if best is not None and len(columns) * NUMBERS > len(target):
            break
        factors = _solved(columns, target)
        left = _left(columns, factors, target)
        if best is None or left < best[1] * (1 - max(GAIN, NUMBERS * (len(columns) - best[2]) / len(target))):
            chosen = zip(terms, factors.tolist(), strict=True)
            best = tuple(replace(term, factor=factor) for term, factor in chosen), left, len(columns)
        if best[1] <= NEGLIGIBLE**2 * float(target.square().sum()):
            break
    assert best is not None
    return best[0], best[1]


def _solved(columns: Sequence[Tensor], target: Tensor) -> Tensor:
    """Factors of the columns, by least squares."""
    if not columns:
        return target.new_zeros(0)
    matrix = torch.stack(tuple(columns), 1)
    lengths = matrix.norm(dim=0)
    return torch.linalg.lstsq(matrix / lengths, target[:, None], rcond=RCOND, driver="gelsd").solution[:, 0] / lengths


def _left(columns: Sequence[Tensor], factors: Tensor, target: Tensor) -> float:
    """Squared length of what the columns do not explain."""
    left = target.clone()
    for column, factor in zip(columns, factors, strict=True):
        left -= factor * column
    return float(left.square().sum())
