"""What a recorded step decided, brought to the host without waiting, and written down as host dispatch would have."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.base.errors import PolicyError
from runtime.calls.bound import ReadyBlock
from runtime.calls.tally import Tally
from runtime.device.policy import COMPUTE_CASE, REUSE_CASE, SKIP_CASE, UNPLANNED
from runtime.device.requests import DeviceRequest, Ledger
from runtime.device.step import OWN, Step
from runtime.face.arguments import refuse_infinite
from runtime.requests.trace import RequestTrace
from runtime.routing.folded import gate_of
from runtime.routing.policy import REUSE, SKIP

UNNAMED = "branch 0"
"""How the calls that come without a context are called in traces."""


@dataclass(frozen=True)
class Reading:
    """A copy of `Step.whole` under way to the host; `done` is None where it is there already."""

    values: Tensor
    done: torch.cuda.Event | None
    step: Step
    context: str | None
    ledger: Ledger
    request: weakref.ref[DeviceRequest]
    tally: Tally

    @classmethod
    def begin(cls, step: Step, context: str | None, request: DeviceRequest, tally: Tally) -> Reading:
        """Start copying what the last replay of `step` left."""
        there = step.whole
        if not there.is_cuda:
            return cls(there.clone(), None, step, context, request.ledger, weakref.ref(request), tally)
        values = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
        values.copy_(there, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return cls(values, done, step, context, request.ledger, weakref.ref(request), tally)

    def wait(self) -> None:
        """Until the copy is there."""
        if self.done is not None:
            self.done.synchronize()

    def arrived(self) -> bool:
        """Whether the copy is there."""
        return self.done is None or self.done.query()

    def write_down(self) -> bool:
        """Fill the request's trace and the tally, once the copy is there; whether nothing may be reused (see requests).

        Raises InputError for inputs and EditError for a router's logits that are not finite, PolicyError for a step
        that a schedule lacks.
        """
        epoch, _, number, untold = map(int, self.values[:OWN].tolist())
        finite, logits, decisions = self.step.views(self.values)
        refuse_infinite([name for name, flag in zip(self.step.names, finite.tolist(), strict=True) if not flag])
        record = self.ledger.record(epoch)
        for block in self.step.guarded:
            self._guard(block, number, logits[block].tolist(), decisions[block].int().tolist(), record)
        return bool(untold)

    def _guard(self, block: int, step: int, logits: list[list[float]], cases: list[int], record: RequestTrace) -> None:
        ready = self.step.blocks[block]
        gate = [gate_of(row, ready.name or str(block), self.step.router_dtype) if row else 1.0 for row in logits]
        if UNPLANNED in cases:
            raise PolicyError(f"the schedule does not cover step {step}")
        record.add(
            record.context(UNNAMED if self.context is None else self.context),
            step,
            block,
            gate,
            [_decision(ready, case) for case in cases],
        )
        self.tally.guard()
        for case in cases:
            if case in (SKIP_CASE, REUSE_CASE):
                self.tally.left(ready, _decision(ready, case), 1)
            else:
                self.tally.computed(ready, case - COMPUTE_CASE, 1)


def _decision(ready: ReadyBlock, case: int) -> float:
    if case == SKIP_CASE:
        return SKIP
    return REUSE if case == REUSE_CASE else ready.plan.variants[case - COMPUTE_CASE].width
