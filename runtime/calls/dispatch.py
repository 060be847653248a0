"""Algorithm 1, one guard at a time: route, decide, and do what each row of the batch needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.base import transfer
from runtime.base.errors import InnerShapeError, PolicyError
from runtime.bundle.spec import Glue, Plan
from runtime.calls.bound import BoundBlock, BoundBlocks
from runtime.requests.bank import Residuals
from runtime.requests.change import Watch
from runtime.requests.request import Branch
from runtime.requests.trace import RequestTrace
from runtime.routing.folded import gate_of
from runtime.routing.policy import EMPTY, EXTRAPOLATE, SKIP, Decider, residuals_kept


@dataclass(frozen=True)
class Scene:
    """What a call's guards are answered from: its branch, step, trace and timestep (one, or one per row).

    `times` are those timesteps on the host, one where all rows have the same.
    """

    branch: Branch
    step: int
    trace: RequestTrace
    timestep: Tensor
    times: tuple[float, ...]


class Dispatch:
    """Answers the guards of one forward call (`runtime.base.guard.Answer`).

    Each guard costs one transfer to the host (the router's logits), which synchronises with the device: what is
    enqueued next depends on it. Nothing else between guards does; a guard without a router does not either. Rows that
    need the same thing share one engine call; where all rows agree nothing is gathered or scattered.

    Around a hosted glue a skipped block's states are copied, since the model's own Python may write into them. There,
    and where values set sizes, the shapes of a block's inputs are checked; `grow` makes the program fit the call.
    `answered` is each guard's plan and what was done with its rows.
    """

    def __init__(
        self,
        blocks: BoundBlocks,
        policy: Decider,
        scene: Scene,
        glue: Glue,
        grow: Callable[[], None] | None = None,
    ) -> None:
        self._engine, self._blocks, self._grow = blocks.engine, blocks, grow
        self._routers = blocks.routers if policy.routed else None
        self._policy = policy
        self._keeps = residuals_kept(policy, self._routers is not None)
        self._watch = Watch(policy.watches if self._keeps else None)
        self._scene = scene
        self._context = scene.trace.context(scene.branch.name)
        self._embedding: Tensor | None = None
        self._copies = glue.file is None
        self._checks = self._copies or bool(glue.sized_by)
        self._glue = glue
        self.answered: list[tuple[Plan, list[float]]] = []
        self.rows = 1

    def __call__(self, block: int, inputs: Sequence[Tensor], form: int = 0) -> list[Tensor]:
        """The states of `block` after it, from its tensor inputs in plan order."""
        ready = self._fitting(block, form, inputs) if self._checks else self._blocks.forms[block][form]
        states = [inputs[index] for index in ready.states]
        with self._engine.hosting(sum(state.numel() for state in states)):
            return self._answer(block, ready, inputs, states)

    def _fitting(self, block: int, form: int, inputs: Sequence[Tensor]) -> BoundBlock:
        """The form that takes inputs of these shapes, traced first if need be; InnerShapeError where there is none."""
        try:
            return self._blocks.fitting(block, form, inputs, self._glue)
        except InnerShapeError:
            if self._grow is None:
                raise
        self._grow()
        return self._blocks.fitting(block, form, inputs, self._glue)

    def _answer(self, block: int, ready: BoundBlock, inputs: Sequence[Tensor], states: list[Tensor]) -> list[Tensor]:
        rows = self.rows = ready.rows(inputs)
        gate, width = self._route(block, ready, inputs, states, rows)
        scene = self._scene
        bank = scene.branch.bank(block, states, ready.state_dims)
        change = self._watch.change(bank, states, ready.state_dims)
        decisions = self._policy.decide(scene.step, block, gate, width, bank.held, change)
        done = [d if d <= SKIP else ready.plan.variants[ready.variant_for(d)].width for d in decisions]
        if any(d < SKIP and k == EMPTY for d, k in zip(done, bank.held, strict=True)):
            raise PolicyError("the policy reuses a residual where there is none")
        scene.trace.add(self._context, scene.step, block, gate, done)
        self.answered.append((ready.plan, done))
        if done.count(done[0]) == rows:
            after = self._rows_alike(ready, bank, done[0], inputs, states)
        else:
            after = self._rows_apart(ready, bank, done, inputs, states)
        self._watch.passed(bank)
        return after

    def _route(
        self, block: int, ready: BoundBlock, inputs: Sequence[Tensor], states: Sequence[Tensor], rows: int
    ) -> tuple[list[float], list[float]]:
        """p and width per row (equations 10 and 12); wide open where there is no router."""
        if self._routers is None:
            return [1.0] * rows, [1.0] * rows
        if ready.time is not None:
            time = inputs[ready.time]
        else:
            if self._embedding is None:
                self._embedding = self._routers.embed(self._scene.timestep, rows)
            time = self._embedding
        logits: list[list[float]] = transfer.to_host(self._routers(block, ready.rows_first(states), time))
        widths = self._routers.config.widths
        gate = [gate_of(row, ready.name or str(block), self._routers.dtype) for row in logits]
        return gate, [widths[row.index(max(row[1:]), 1) - 1] for row in logits]

    def _rows_alike(
        self, ready: BoundBlock, bank: Residuals, decision: float, inputs: Sequence[Tensor], states: list[Tensor]
    ) -> list[Tensor]:
        """The same for all rows."""
        if decision == SKIP:
            return [state.clone() for state in states] if self._copies else states
        if decision < SKIP:
            return bank.reuse(states, times=self._times(bank) if decision == EXTRAPOLATE else None)
        after = ready.bound[ready.variant_for(decision)](inputs)
        self._keep(ready, bank, states, after)
        return after

    def _rows_apart(
        self, ready: BoundBlock, bank: Residuals, done: Sequence[float], inputs: Sequence[Tensor], states: list[Tensor]
    ) -> list[Tensor]:
        """Rows grouped by what they need, results scattered back."""
        after = [torch.empty_like(state) for state in states]
        for decision in sorted(set(done)):
            chosen = [row for row, own in enumerate(done) if own == decision]
            index = transfer.row_index(tuple(chosen), states[0].device)
            if decision <= SKIP:
                parts = [state.index_select(dim, index) for state, dim in zip(states, ready.state_dims, strict=True)]
                if decision < SKIP:
                    parts = bank.reuse(parts, chosen, index, self._times(bank) if decision == EXTRAPOLATE else None)
            else:
                taken = ready.take(inputs, index, len(done))
                parts = ready.bound[ready.variant_for(decision)](taken)
                self._keep(ready, bank, [taken[i] for i in ready.states], parts, chosen, index)
            for whole, part, dim in zip(after, parts, ready.state_dims, strict=True):
                whole.index_copy_(dim, index, part)
        return after

    def _keep(
        self,
        ready: BoundBlock,
        bank: Residuals,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        rows: Sequence[int] | None = None,
        index: Tensor | None = None,
    ) -> None:
        """Have `bank` hold what computing has added to `rows` (all where None), if the policy may ask for it."""
        if not self._keeps:
            bank.clear(rows)
            return
        bank.keep(before, after, rows, index, self._times(bank) if self._keeps > 1 else None)
        self._watch.computed(bank, ready.state_dims, range(len(bank.held)) if rows is None else rows)

    def _times(self, bank: Residuals) -> Sequence[float] | None:
        """The timestep of every row of a block, which may have several for each sample; None where not known."""
        times, rows = self._scene.times, len(bank.held)
        return None if rows % len(times) else [time for time in times for _ in range(rows // len(times))]
