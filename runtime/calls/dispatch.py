"""Algorithm 1, one guard at a time: route, decide, and do what each row of the batch needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from runtime.base import transfer
from runtime.base.errors import InnerShapeError, InputError
from runtime.bundle.spec import Glue, Plan
from runtime.calls.bound import BoundBlock, BoundBlocks
from runtime.calls.rows import Rows, Scene
from runtime.routing.folded import gate_of
from runtime.routing.policy import SKIP


class Dispatch:
    """Answers the guards of one forward call (`runtime.base.guard.Answer`).

    `scenes` are those of the requests whose rows the batch holds, equally many each and in this order; `timestep` is
    the call's (one, or one per row). Each guard costs one transfer to the host (the router's logits), which
    synchronises with the device: what is enqueued next depends on it. Nothing else between guards does; a guard
    without a router does not either. Rows that need the same thing share one engine call, whosever they are; where all
    rows agree nothing is gathered or scattered.

    Around a hosted glue a skipped block's states are copied, since the model's own Python may write into them. There,
    and where values set sizes, the shapes of a block's inputs are checked; `grow` makes the program fit the call.
    `answered` is each guard's plan and what was done with its rows.
    """

    def __init__(
        self,
        blocks: BoundBlocks,
        scenes: Sequence[Scene],
        timestep: Tensor,
        glue: Glue,
        grow: Callable[[], None] | None = None,
    ) -> None:
        self._engine, self._blocks, self._grow = blocks.engine, blocks, grow
        self._everyone = [Rows(scene, blocks.routers is not None) for scene in scenes]
        self._routers = blocks.routers if any(one.routed for one in self._everyone) else None
        self._timestep = timestep
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
        done: list[float] = []
        each, left = divmod(rows, len(self._everyone))
        if left:
            raise InputError(
                f"block {ready.name or block} has {rows} rows, which {len(self._everyone)} requests cannot share "
                "equally: call this model for each request alone"
            )
        for one in self._everyone:
            one.start, one.stop = start, stop = len(done), len(done) + each
            own = _narrowed(states, ready.state_dims, start, each)
            done += one.decide(block, ready, gate[start:stop], width[start:stop], own)
        self.answered.append((ready.plan, done))
        if done.count(done[0]) == rows:
            after = self._rows_alike(ready, done[0], inputs, states)
        else:
            after = self._rows_apart(ready, done, inputs, states)
        for one in self._everyone:
            one.passed()
        return after

    def _route(
        self, block: int, ready: BoundBlock, inputs: Sequence[Tensor], states: Sequence[Tensor], rows: int
    ) -> tuple[list[float], list[float]]:
        """p and width per row (equations 10 and 12); nothing where no router is asked."""
        if self._routers is None:
            return [], []
        if ready.time is not None:
            time = inputs[ready.time]
        else:
            if self._embedding is None:
                self._embedding = self._routers.embed(self._timestep, rows)
            time = self._embedding
        logits: list[list[float]] = transfer.to_host(self._routers(block, ready.rows_first(states), time))
        widths = self._routers.config.widths
        gate = [gate_of(row, ready.name or str(block), self._routers.dtype) for row in logits]
        return gate, [widths[row.index(max(row[1:]), 1) - 1] for row in logits]

    def _rows_alike(
        self, ready: BoundBlock, decision: float, inputs: Sequence[Tensor], states: list[Tensor]
    ) -> list[Tensor]:
        """The same for all rows."""
        if decision == SKIP:
            return [state.clone() for state in states] if self._copies else states
        after = states if decision < SKIP else list(ready.bound[ready.variant_for(decision)](inputs))
        return self._with_residuals(ready, decision, range(self.rows), states, after)

    def _rows_apart(
        self, ready: BoundBlock, done: Sequence[float], inputs: Sequence[Tensor], states: list[Tensor]
    ) -> list[Tensor]:
        """Rows grouped by what they need, results scattered back."""
        whole = [torch.empty_like(state) for state in states]
        for decision in sorted(set(done)):
            chosen = [row for row, own in enumerate(done) if own == decision]
            index = transfer.row_index(tuple(chosen), states[0].device)
            if decision <= SKIP:
                after = [state.index_select(dim, index) for state, dim in zip(states, ready.state_dims, strict=True)]
                before = after
            else:
                taken = ready.take(inputs, index, len(done))
                after = list(ready.bound[ready.variant_for(decision)](taken))
                before = [taken[i] for i in ready.states]
            if decision != SKIP:
                after = self._with_residuals(ready, decision, chosen, before, after)
            for all_rows, part, dim in zip(whole, after, ready.state_dims, strict=True):
                all_rows.index_copy_(dim, index, part)
        return whole

    def _with_residuals(
        self, ready: BoundBlock, decision: float, chosen: Sequence[int], before: list[Tensor], after: list[Tensor]
    ) -> list[Tensor]:
        """The states of the rows `chosen`: their residuals added, or kept where they were computed."""
        found, first = [], 0
        for one in self._everyone:
            own = one.among(chosen)
            if own:
                old, new = (_narrowed(each, ready.state_dims, first, len(own)) for each in (before, after))
                first += len(own)
                if decision > SKIP:
                    one.keep(old, new, own)
                else:
                    found.append(one.reuse(old, own, decision))
        if len(found) < 2:
            return found[0] if found else after
        joined = zip(zip(*found, strict=True), before, ready.state_dims, strict=True)
        # in the strides that states have, on which the glue's views depend
        return [torch.cat(own, dim, out=torch.empty_like(old)) for own, old, dim in joined]


def _narrowed(states: Sequence[Tensor], dims: Sequence[int], first: int, rows: int) -> Sequence[Tensor]:
    """`rows` of the rows of each state, from `first` on: views."""
    pairs = zip(states, dims, strict=True)
    return [each if each.shape[dim] == rows else each.narrow(dim, first, rows) for each, dim in pairs]
