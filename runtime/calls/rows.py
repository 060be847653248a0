"""One request's rows of a call: what decides for them, the residuals they have, what is traced of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from runtime.base.errors import PolicyError
from runtime.base.transfer import row_index
from runtime.calls.bound import BoundBlock
from runtime.requests.bank import Residuals
from runtime.requests.change import Watch
from runtime.requests.request import Branch
from runtime.requests.sighting import Sighting
from runtime.requests.trace import RequestTrace
from runtime.routing.policy import EMPTY, EXTRAPOLATE, SKIP, Decider, residuals_kept
from runtime.routing.schedule import ScheduledPolicy


@dataclass(frozen=True)
class Scene:
    """What a request's guards are answered from in a call: its branch, step, trace and policy.

    `times` are its timesteps on the host, one where all its rows have the same.
    """

    branch: Branch
    step: int
    trace: RequestTrace
    times: tuple[float, ...]
    policy: Decider


def nobodys(seen: Sighting, blocks: int, decision: float) -> Scene:
    """The scene of a call that is no request's: all `blocks` are decided alike, nothing is kept of it."""
    policy = ScheduledPolicy(np.full((1, blocks), decision), routed=False)
    return Scene(Branch("", 0, seen, {}), 0, RequestTrace(""), (0.0,), policy)


class Rows:
    """A request's rows of the batch in one call, guard after guard: `start` and `stop` are those of the last guard."""

    def __init__(self, scene: Scene, routers: bool) -> None:
        self.scene = scene
        self.routed = routers and scene.policy.routed
        self.start = self.stop = 0
        self._keeps = residuals_kept(scene.policy, self.routed)
        self._watch = Watch(scene.policy.watches if self._keeps else None)
        self._context = scene.trace.context(scene.branch.name)
        self._ready: BoundBlock
        self._bank: Residuals

    def decide(
        self, block: int, ready: BoundBlock, gate: Sequence[float], width: Sequence[float], states: Sequence[Tensor]
    ) -> list[float]:
        """What is done with each row: SKIP, REUSE, EXTRAPOLATE or a width that `ready` has; `states` are its rows'."""
        scene, self._ready = self.scene, ready
        bank = self._bank = scene.branch.bank(block, states, ready.state_dims)
        if not self.routed:
            gate = width = [1.0] * len(bank.held)
        change = self._watch.change(bank, states, ready.state_dims)
        decisions = scene.policy.decide(scene.step, block, gate, width, bank.held, change)
        done = [d if d <= SKIP else ready.plan.variants[ready.variant_for(d)].width for d in decisions]
        if any(d < SKIP and k == EMPTY for d, k in zip(done, bank.held, strict=True)):
            raise PolicyError("the policy reuses a residual where there is none")
        scene.trace.add(self._context, scene.step, block, gate, done)
        return done

    def among(self, chosen: Sequence[int]) -> list[int]:
        """Which of its own rows, from 0, are among the batch's rows `chosen`."""
        return [row - self.start for row in chosen if self.start <= row < self.stop]

    def reuse(self, states: Sequence[Tensor], own: Sequence[int], decision: float) -> list[Tensor]:
        """`states` of its rows `own`, with the residuals that they have."""
        rows, index = self._subset(own, states)
        times = self._times() if decision == EXTRAPOLATE else None
        return self._bank.reuse(states, rows, index, times)

    def keep(self, before: Sequence[Tensor], after: Sequence[Tensor], own: Sequence[int]) -> None:
        """Hold what computing has added to its rows `own`, if the policy may ask for it."""
        rows, index = self._subset(own, before)
        if self._keeps:
            self._bank.keep(before, after, rows, index, self._times() if self._keeps > 1 else None)
            self._watch.computed(self._bank, self._ready.state_dims, own)
        else:
            self._bank.clear(rows)

    def passed(self) -> None:
        """The guard is answered."""
        self._watch.passed(self._bank)

    def _subset(self, own: Sequence[int], states: Sequence[Tensor]) -> tuple[Sequence[int] | None, Tensor | None]:
        """`own` as the bank takes rows: nothing where it is all of them."""
        if len(own) == self.stop - self.start:
            return None, None
        return own, row_index(tuple(own), states[0].device)

    def _times(self) -> Sequence[float] | None:
        """The timestep of every row of a block, which may have several for each sample; None where not known."""
        times, rows = self.scene.times, len(self._bank.held)
        return None if rows % len(times) else [time for time in times for _ in range(rows // len(times))]
