"""Sampling with fewer steps, as far as recorded calls tell it: what every other way has to be better than."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from edit_compile.calls.stages import Stage
from edit_compile.tuning.schedules import even
from runtime.face.transformer import CompiledTransformer


class FewerSteps:
    """A compiled transformer of which only some steps of a generation are called; in others it gives what it gave.

    For samplers that go straight along what the model gives (Euler steps of a flow) that is the sampler with fewer,
    longer steps, which begin where recorded ones did: just that of `count` steps where `count` divides their number;
    elsewhere some of its steps are longer than others, where a sampler of its own would make them equally long. For
    other samplers it is near it.
    """

    def __init__(self, compiled: CompiledTransformer, stages: tuple[Stage, ...], count: int) -> None:
        self._compiled, self.device = compiled, compiled.device
        self._places = [(number, branch) for number, stage in enumerate(stages) for branch in range(len(stage.calls))]
        self._kept = set(even(len(stages), count))
        self._given: dict[int, Any] = {}
        self._next = 0

    def __call__(self, **arguments: Any) -> Any:
        """What the model gives, or gave for this branch in the last step that was called."""
        step, branch = self._places[self._next]
        self._next += 1
        if step in self._kept or branch not in self._given:
            self._given[branch] = self._compiled(**arguments)
        return self._given[branch]

    def cache_context(self, name: str) -> AbstractContextManager[Any]:
        """As of the transformer."""
        context: AbstractContextManager[Any] = self._compiled.cache_context(name)
        return context
