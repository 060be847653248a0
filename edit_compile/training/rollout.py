"""Recorded generations made again for some steps, with gradients: how far a model takes the latents off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edit_compile.calls.draft import tensors_of
from edit_compile.calls.generations import CallsError, Generation, RecordedCall
from edit_compile.calls.replaying import Placed, device_of, in_context
from edit_compile.calls.sampler import Sampler, Term
from edit_compile.calls.stages import Stage
from edit_compile.elastic.straight_through import Routing
from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.training.banked import BankedRule, Held
from runtime.face.arguments import mapped
from runtime.routing.policy import RoutingPolicy


@dataclass(frozen=True)
class Window:
    """`length` steps from recorded step `start` on, each as long as `stride` recorded ones; of its own `sampler`."""

    generation: Generation
    sampler: Sampler
    start: int
    length: int
    stride: int = 1


@dataclass(frozen=True)
class RolledOut:
    """What a rollout gave.

    `errors` has for each step how far the latents that it leads to are off, |dx|^2 over the |x' - x|^2 that was
    recorded, mean over groups of rows (scalars, with gradients). `routing` has the decisions of each call, and
    `reused` the share of its (row, block) pairs that reused.
    """

    errors: list[Tensor]
    routing: list[Routing]
    reused: list[Tensor]


def roll_out(elastic: ElasticTransformer, window: Window, policy: RoutingPolicy, noise: float = 0.0) -> RolledOut:
    """Make the window's steps with `elastic` by Algorithm 1, from the latents that were recorded and an empty bank.

    Each step is given the latents that the steps before it led to, without their gradients. What was recorded is the
    teacher: the model is to lead to the recorded latents, also from latents that it has taken off them. A step of
    several recorded ones goes on with what the model gave in the first of them: for samplers that go straight along
    that (Euler steps of a flow) it is the sampler with fewer, longer steps.

    Raises CallsError where branches or rows change within a step.
    """
    return _Rollout(elastic, window, policy, noise).run()


class _Rollout:
    def __init__(self, elastic: ElasticTransformer, window: Window, policy: RoutingPolicy, noise: float) -> None:
        self.elastic, self.window, self.policy, self.noise = elastic, window, policy, noise
        self.generation, self.place = window.generation, window.sampler.place
        self._placed = Placed(device_of(elastic))
        self._moved: dict[tuple[int, int], Tensor] = {}  # by (call, row): how far its latents are off
        self._off: dict[tuple[int, int], Tensor] = {}  # and what the model gave for them
        self._banks: dict[str | int, dict[int, Held]] = {}
        self._given = RolledOut([], [], [])

    def run(self) -> RolledOut:
        stages, window = self.window.sampler.stages_of(self.generation), self.window
        moved = [torch.zeros((), device=self._placed.device)] * len(stages[window.start].distinct)
        for first in range(window.start, window.start + window.length * window.stride, window.stride):
            given = self._make(stages[first], first // window.stride, moved)
            for number in range(first, first + window.stride):
                if stages[number].groups != stages[first].groups:
                    raise CallsError(f"stride={window.stride}: steps {first} and {number} have other branches or rows")
                self._note(stages[number], given, moved)
                moved = [self._sum(terms) for terms in window.sampler.steps[number].groups]
            self._given.errors.append(self._error(moved, stages[first], stages[first + window.stride]))
            moved = [one.detach() for one in moved]
        return self._given

    def _make(self, stage: Stage, step: int, moved: Sequence[Tensor]) -> list[Tensor]:
        """What the model gives in the calls of a stage, whose groups' latents are off by `moved`."""
        outputs = []
        for branch, (index, groups) in enumerate(zip(stage.calls, stage.groups, strict=True)):
            call = self.generation.calls[index]
            key = branch if call.context is None else call.context
            rule = BankedRule(self.policy, step, self._bank(key, len(groups)), self.noise)
            arguments = self._arguments(call, [moved[group] for group in groups])
            with self.elastic.deciding(rule), in_context(self.elastic, call.context):
                given = tensors_of(self.elastic(**arguments))[self.place.output]
            outputs.append(self._numbers(given))
            self._banks[key] = rule.after
            assert self.elastic.routing is not None
            self._given.routing.append(self.elastic.routing)
            self._given.reused.append(torch.stack(list(rule.reusing.values())).float().mean())
        return outputs

    def _bank(self, key: str | int, rows: int) -> dict[int, Held]:
        """What a branch left; nothing where rows joined or left since."""
        bank = self._banks.get(key, {})
        return {} if any(len(held.reused) != rows for held in bank.values()) else bank

    def _note(self, stage: Stage, given: Sequence[Tensor], moved: Sequence[Tensor]) -> None:
        """How far each row of a stage is off, in its latents and in what was `given` for them."""
        for index, groups, now in zip(stage.calls, stage.groups, given, strict=True):
            off = now - self._numbers(self._placed(self.generation.calls[index].outputs[self.place.output]))
            for row, group in enumerate(groups):
                self._moved[index, row], self._off[index, row] = moved[group], off[row]

    def _sum(self, terms: Sequence[Term]) -> Tensor:
        """How far latents are off that are made of `terms`; what was made before the window is not."""
        parts = [
            term.factor * (self._off if term.given else self._moved)[term.call, term.row]
            for term in terms
            if (term.call, term.row) in self._moved
        ]
        return sum(parts, torch.zeros((), device=self._placed.device))

    def _error(self, led: Sequence[Tensor], stage: Stage, after: Stage) -> Tensor:
        recorded = [
            float((target - stage.distinct[origin]).square().sum())
            for target, origin in zip(after.distinct, after.origins(stage), strict=True)
        ]
        return torch.stack([off.square().sum() / step for off, step in zip(led, recorded, strict=True)]).mean()

    def _arguments(self, call: RecordedCall, moved: Sequence[Tensor]) -> dict[str, Any]:
        """Those of a call, with each row's latents moved on."""
        latents = self._placed(self.place.latents_of(call)).clone()
        part = self.place.within(latents)
        for row, by in enumerate(moved):
            part[row] += by.reshape(self.place.sizes if by.ndim else ()).to(part.dtype)
        name = self.place.latents
        return mapped(call.arguments, lambda own, tensor: latents if own == name else self._placed(tensor))

    def _numbers(self, tensor: Tensor) -> Tensor:
        """What moves of an output, (rows, numbers) float32."""
        return self.place.within(tensor).flatten(1).float()
