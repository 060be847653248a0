"""What a recorded step decided, brought to the host without waiting, and written down as host dispatch would have."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.base.errors import PolicyError, refuse_infinite
from runtime.calls.bound import BoundBlock
from runtime.device.policy import COMPUTE_CASE, REUSE_CASE, SKIP_CASE, UNPLANNED
from runtime.device.state import DeviceState, Ledger
from runtime.device.step import OWN, Step
from runtime.requests.rule import Verdict
from runtime.requests.trace import Costs, Counters, work
from runtime.routing.folded import gate_of
from runtime.routing.policy import REUSE, SKIP


@dataclass(frozen=True)
class Reading:
    """A copy of `Step.whole` under way to the host; `done` is None where it is there already. `branch` is its name."""

    values: Tensor
    done: torch.cuda.Event | None
    step: Step
    branch: str
    ledger: Ledger
    state: weakref.ref[DeviceState]
    costs: Costs

    @classmethod
    def begin(cls, step: Step, branch: str, state: DeviceState, costs: Costs) -> Reading:
        """Start copying what the last replay of `step` left."""
        values, done = step.whole, None
        if not values.is_cuda:
            values = values.clone()
        else:
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values.copy_(step.whole, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return cls(values, done, step, branch, state.ledger, weakref.ref(state), costs)

    def wait(self) -> None:
        """Until the copy is there."""
        if self.done is not None:
            self.done.synchronize()

    def arrived(self) -> bool:
        """Whether the copy is there."""
        return self.done is None or self.done.query()

    def write_down(self) -> tuple[Verdict, Counters]:
        """Fill the request's trace, once the copy is there; what the call was to its request, and its work.

        Raises InputError for inputs and EditError for a router's logits that are not finite, PolicyError for a step
        that a schedule lacks.
        """
        epoch, _, _, number, verdict = map(int, self.values[:OWN].tolist())
        finite, logits, decisions = self.step.views(self.values)
        refuse_infinite([name for name, flag in zip(self.step.names, finite.tolist(), strict=True) if not flag])
        record = self.ledger.record(epoch)
        answered = []
        for block in self.step.guarded:
            ready, cases = self.step.blocks[block], decisions[block].int().tolist()
            router = self.step.router_dtype
            gate = [gate_of(row, ready.name or str(block), router) if row else 1.0 for row in logits[block].tolist()]
            if UNPLANNED in cases:
                raise PolicyError(f"the schedule does not cover step {number}")
            done = [_decision(ready, case) for case in cases]
            record.add(record.context(self.branch), number, block, gate, done)
            answered.append((ready.plan, done))
        return Verdict(verdict), work(answered, self.costs, together=False)


def _decision(ready: BoundBlock, case: int) -> float:
    if case == SKIP_CASE:
        return SKIP
    return REUSE if case == REUSE_CASE else ready.plan.variants[case - COMPUTE_CASE].width
