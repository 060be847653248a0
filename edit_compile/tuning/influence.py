"""How much what the model gives in each call counts in the end.

A sampler adds up what the model gives, x' = a x + b_1 v_1 + ..., so its result is a sum of all outputs. If those were
off by dv, and nothing else were, the result would be off by

    dx_N = sum over calls and rows of w dv

with scalars w that follow from a and b. That leaves out what a model gives for latents that are off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_compile.calls.generations import Generation
from edit_compile.calls.sampler import Sampler, Term
from edit_compile.calls.stages import Stage

Weights = Mapping[tuple[int, int], float]
"""w of (call, row)."""


@dataclass(frozen=True)
class Influence:
    """Of one generation: its `stages` with calls, and, for each group of rows in the end, w of every call and row.

    The end is the generation's result, or where that is not recorded the latents of its last calls.
    """

    stages: tuple[Stage, ...]
    weights: tuple[Weights, ...]

    @classmethod
    def of(cls, generation: Generation, sampler: Sampler) -> Influence:
        """By the sampler that was fitted to `generation`."""
        stages = sampler.stages_of(generation)
        place = {member: number for number, stage in enumerate(stages) for member in _members(stage)}
        made: list[list[Weights]] = [[{} for _ in stages[0].distinct]]
        for step in sampler.steps:
            made.append([_summed(terms, made, stages, place) for terms in step.groups])
        return cls(tuple(stage for stage in stages if stage.calls), tuple(made[-1]))

    def error(self, off: Mapping[int, Tensor]) -> list[Tensor]:
        """By how much each group is off in the end if outputs of calls are `off` (rows, numbers): (numbers,) each."""
        errors = []
        for weights in self.weights:
            parts = [weights[call, row] * rows[row] for call, rows in off.items() for row in range(len(rows))
                     if (call, row) in weights]  # fmt: skip
            first = next(iter(off.values()))[0]
            errors.append(torch.stack(parts).sum(0) if parts else torch.zeros_like(first))
        return errors


def _members(stage: Stage) -> list[tuple[int, int]]:
    if not stage.calls:  # that of the result
        return []
    return [(call, row) for call, groups in zip(stage.calls, stage.groups, strict=True) for row in range(len(groups))]


def _summed(
    terms: Sequence[Term],
    made: Sequence[Sequence[Weights]],
    stages: Sequence[Stage],
    place: Mapping[tuple[int, int], int],
) -> Weights:
    """w of latents that are made of `terms`."""
    summed: dict[tuple[int, int], float] = {}
    for term in terms:
        before: Weights = {(term.call, term.row): 1.0}
        if not term.given:
            number = place[term.call, term.row]
            stage = stages[number]
            group = stage.groups[stage.calls.index(term.call)][term.row]
            before = made[number][group]
        for key, weight in before.items():
            summed[key] = summed.get(key, 0.0) + term.factor * weight
    return summed
