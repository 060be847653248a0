"""The steps of a recorded generation: which calls have the same latents, and which rows of a batch.

Guidance calls the model several times with the same latents, or joins their rows in one batch. Rows of a call with
equal latents are one *group*, calls one after another with equal groups one *stage*: the sampler makes the latents of
the next stage from those of this one and from what the model gave in its calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edit_compile.calls.generations import CallsError, Generation
from edit_compile.calls.place import Place
from runtime.face.arguments import flatten


@dataclass(frozen=True)
class Stage:
    """Calls with the same latents.

    `groups` has, for each of `calls`, the number of each row's group; `distinct` (groups, numbers) float64 is what
    moves of the latents of each group. A generation's result is a stage without calls; its `groups` are of its rows.
    """

    calls: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    distinct: Tensor

    def members(self, group: int) -> list[tuple[int, int]]:
        """(call, row) of all that has the latents of `group`, in order."""
        return [
            (call, row)
            for call, groups in zip(self.calls, self.groups, strict=True)
            for row, own in enumerate(groups)
            if own == group
        ]

    def origins(self, before: Stage) -> tuple[int, ...]:
        """For each group the one of `before` that it came from: by rows; by order where rows joined or left."""
        here, there = self.groups[0], before.groups[0]
        if len(here) == len(there):
            return tuple(there[here.index(group)] for group in range(len(self.distinct)))
        if len(self.distinct) == len(before.distinct):
            return tuple(range(len(self.distinct)))
        return tuple(torch.cdist(self.distinct, before.distinct).argmin(1).tolist())


def stages_of(generation: Generation, place: Place) -> tuple[Stage, ...]:
    """The stages in order, and last that of the result where it is known; CallsError where it is no latents."""
    stages: list[Stage] = []
    for index, call in enumerate(generation.calls):
        latents = flatten(call.arguments)[0].get(place.latents)
        if latents is None or not place.holds(latents) or len(call.outputs) <= place.output:
            raise CallsError(f"calls[{index}] has not the latents {place.latents!r}, or not the output, of the sampler")
        groups, distinct = _grouped(place.rows(latents))
        if stages and torch.equal(stages[-1].distinct, distinct):
            last = stages.pop()
            stages.append(Stage((*last.calls, index), (*last.groups, groups), distinct))
        else:
            stages.append(Stage((index,), (groups,), distinct))
    result = generation.result
    if result is not None:
        if not place.holds(result):
            raise CallsError(
                f"the result is of shape {tuple(result.shape)}, and what moves of the latents (*, "
                f"{', '.join(map(str, place.sizes))}): record latents as the result, or leave it out, by "
                "dataclasses.replace(generation, result=None)"
            )
        groups, distinct = _grouped(place.rows(result))
        stages.append(Stage((), (groups,), distinct))
    return tuple(stages)


def _grouped(rows: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The number of each row's group, counted in order, and the distinct rows."""
    groups: list[int] = []
    firsts: list[int] = []
    for index, row in enumerate(rows):
        known = next((group for group, first in enumerate(firsts) if torch.equal(rows[first], row)), len(firsts))
        if known == len(firsts):
            firsts.append(index)
        groups.append(known)
    return tuple(groups), rows[firsts]
