"""Algorithm 1, one guard at a time: route, decide, and do what each row of the batch needs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from runtime.base import transfer
from runtime.base.errors import PolicyError
from runtime.calls.bound import ReadyBlock, ReadyBlocks, called
from runtime.calls.tally import Costs, Tally
from runtime.requests.bank import Residuals
from runtime.requests.state import Branch
from runtime.requests.trace import Counters, RequestTrace
from runtime.routing.folded import gate_of
from runtime.routing.policy import EMPTY, REUSE, SKIP, Decider, keeps_residuals


class Dispatch:
    """Answers the guards of one forward call (`runtime.base.guard.Answer`).

    Each guard costs one transfer to the host (the router's logits), for which the host waits: what it
    enqueues next depends on it. It waits for nothing else between guards; a guard without a router does
    not wait at all. Rows that need the same thing share one engine call; where all rows agree nothing is
    gathered or scattered. With `copies`, a skipped block's states are copied instead of passed on, for
    callers that write into them.
    """

    def __init__(
        self,
        blocks: ReadyBlocks,
        policy: Decider,
        branch: Branch,
        step: int,
        record: RequestTrace,
        timestep: Tensor,
        costs: Costs,
        copies: bool = False,
    ) -> None:
        self._engine, self._forms = blocks.engine, blocks.forms
        self._routers = blocks.routers if policy.routed else None
        self._widths = blocks.routers.config.widths if blocks.routers is not None else (1.0,)
        self._policy = policy
        self._keeps = keeps_residuals(policy, self._routers is not None)
        self._branch = branch
        self._step = step
        self._record = record
        self._context = record.context(branch.name)
        self._timestep = timestep
        self._embedding: Tensor | None = None
        self._tally = Tally(costs)
        self._copies = copies
        self.rows = 1

    def __call__(self, block: int, inputs: Sequence[Tensor], form: int = 0) -> list[Tensor]:
        """The states of `block` after it, from its tensor inputs in plan order."""
        ready = called(self._forms[block], inputs, form, checked=self._copies)
        states = [inputs[index] for index in ready.states]
        with self._engine.hosting(sum(state.numel() for state in states)):
            return self._answer(block, ready, inputs, states)

    def _answer(self, block: int, ready: ReadyBlock, inputs: Sequence[Tensor], states: list[Tensor]) -> list[Tensor]:
        rows = self.rows = ready.rows(inputs)
        gate, width = self._route(block, ready, inputs, states, rows)
        bank = self._branch.bank(block, rows, ready.state_dims)
        decisions = self._policy.decide(self._step, block, gate, width, bank.held)
        done = [d if d <= SKIP else ready.plan.variants[ready.variant_for(d)].width for d in decisions]
        self._record.add(self._context, self._step, block, gate, done)
        self._tally.guard()
        first = done[0]
        if done.count(first) == rows:
            return self._whole(ready, bank, first, inputs, states, rows)
        return self._split(ready, bank, done, inputs, states)

    def counters(self) -> Counters:
        """What this call has done so far (glue not included)."""
        return self._tally.counters()

    def _route(
        self, block: int, ready: ReadyBlock, inputs: Sequence[Tensor], states: Sequence[Tensor], rows: int
    ) -> tuple[list[float], list[float]]:
        """p and width per row (equations 10 and 12); wide open where there is no router."""
        if self._routers is None:
            return [1.0] * rows, [1.0] * rows
        time = self._sinusoid() if ready.time is None else inputs[ready.time]
        logits: list[list[float]] = transfer.to_host(self._routers(block, ready.rows_first(states), time))
        gate, width = [], []
        for row in logits:
            gate.append(gate_of(row, ready.name or str(block), self._routers.dtype))
            choices = row[1:]
            width.append(self._widths[choices.index(max(choices))])
        return gate, width

    def _sinusoid(self) -> Tensor:
        if self._embedding is None:
            assert self._routers is not None
            self._embedding = self._routers.embed(self._timestep, self.rows)
        return self._embedding

    def _whole(
        self,
        ready: ReadyBlock,
        bank: Residuals,
        decision: float,
        inputs: Sequence[Tensor],
        states: list[Tensor],
        rows: int,
    ) -> list[Tensor]:
        """The same for all rows."""
        if decision == SKIP:
            self._tally.left(ready, SKIP, rows)
            return [state.clone() for state in states] if self._copies else states
        if decision == REUSE:
            _check_held(bank, range(rows))
            self._tally.left(ready, REUSE, rows)
            return bank.reuse(states)
        after = self._compute(ready, decision, inputs, rows)
        if self._keeps:
            bank.keep(states, after)
        else:
            bank.clear()
        return after

    def _split(
        self, ready: ReadyBlock, bank: Residuals, done: Sequence[float], inputs: Sequence[Tensor], states: list[Tensor]
    ) -> list[Tensor]:
        """Rows grouped by what they need, results scattered back."""
        after = [state.clone() for state in states]
        for decision in sorted(set(done)):
            chosen = [row for row, own in enumerate(done) if own == decision]
            if decision == SKIP:
                self._tally.left(ready, SKIP, len(chosen))
                continue
            index = transfer.row_index(tuple(chosen), states[0].device)
            if decision == REUSE:
                before = [s.index_select(dim, index) for s, dim in zip(states, ready.state_dims, strict=True)]
                _check_held(bank, chosen)
                self._tally.left(ready, REUSE, len(chosen))
                parts = bank.reuse_rows(chosen, index, before)
            else:
                taken = ready.take(inputs, index, len(done))
                parts = self._compute(ready, decision, taken, len(chosen))
                if self._keeps:
                    bank.keep_rows(chosen, index, [taken[i] for i in ready.states], parts)
                else:
                    bank.clear(chosen)
            for whole, part, dim in zip(after, parts, ready.state_dims, strict=True):
                whole.index_copy_(dim, index, part)
        return after

    def _compute(self, ready: ReadyBlock, width: float, inputs: Sequence[Tensor], rows: int) -> list[Tensor]:
        variant = ready.variant_for(width)
        after = ready.bound[variant](inputs)
        self._tally.computed(ready, variant, rows)
        return after


def _check_held(bank: Residuals, rows: Sequence[int]) -> None:
    if any(bank.held[row] == EMPTY for row in rows):
        raise PolicyError("the policy reuses a residual where there is none")
