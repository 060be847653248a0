"""A policy as numbers on the device: a recorded step reads them, so that another policy needs no new recording."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from runtime.base.errors import PolicyError
from runtime.calls.bound import BoundBlock
from runtime.routing.policy import REUSE, SKIP, Decider, RoutingPolicy, residuals_kept
from runtime.routing.schedule import ScheduledPolicy

UNPLANNED, REUSE_CASE, COMPUTE_CASE, SKIP_CASE = -1, 0, 1, 1000
"""Cases of a guard's switch: reuse; the plan's variants from COMPUTE_CASE on; SKIP_CASE is past the last of them, and
UNPLANNED where a schedule says nothing."""

STEPS = 128
"""Steps of a schedule that there is room for."""


def why_not(policy: Decider) -> str | None:
    """Why `policy` cannot decide on the device; None where it can."""
    if type(policy) not in (RoutingPolicy, ScheduledPolicy):  # a subclass may decide otherwise
        return f"{type(policy).__name__} decides in Python; RoutingPolicy and ScheduledPolicy decide on the device"
    if isinstance(policy, ScheduledPolicy) and policy.beyond == "compute":
        return "the schedule computes steps beyond its table, which the device refuses (beyond='refuse')"
    if isinstance(policy, ScheduledPolicy) and len(policy.table) > STEPS:
        return f"the schedule has {len(policy.table)} steps, the device has room for {STEPS}"
    if policy.keeps > 1:
        return "the policy extrapolates residuals, and the device keeps the last one only"
    return None


class PolicyNumbers:
    """What ``decide.cu`` reads of a policy, for `blocks` and a batch of `rows`.

    `bounds` (2,) float64: tau and tau + margin. `limits` (4,) int32: max_reuse, warmup_steps, whether residuals are
    kept, whether `table` decides. `table` (STEPS, blocks, rows) int32: cases.
    """

    def __init__(self, blocks: Sequence[BoundBlock], rows: int, device: torch.device) -> None:
        self._blocks = blocks
        self._rows = rows
        self.bounds = torch.zeros(2, dtype=torch.float64, device=device)
        self.limits = torch.zeros(4, dtype=torch.int32, device=device)
        self.table = torch.zeros(STEPS, len(blocks), rows, dtype=torch.int32, device=device)
        self._set: Decider | None = None

    def set(self, policy: Decider, gated: bool) -> None:
        """Take over `policy` (see `why_not`), for a program with routers (`gated`) or without; nothing where it is set.

        Raises PolicyError for a schedule of other blocks or rows.
        """
        if policy == self._set:
            return
        keeps = int(residuals_kept(policy, gated))
        if isinstance(policy, ScheduledPolicy):
            cases = self._cases(policy)
            self._fill(self.table[: len(cases)], torch.from_numpy(cases))
            self.table[len(cases) :].fill_(UNPLANNED)
            self._fill(self.limits, torch.tensor([0, 0, keeps, 1], dtype=torch.int32))
        elif isinstance(policy, RoutingPolicy):
            bounds = [policy.threshold, policy.threshold + policy.margin]
            self._fill(self.bounds, torch.tensor(bounds, dtype=torch.float64))
            limits = [policy.max_reuse, policy.warmup_steps, keeps, 0]
            self._fill(self.limits, torch.tensor(limits, dtype=torch.int32))
        self._set = policy

    def _cases(self, policy: ScheduledPolicy) -> np.ndarray:
        """The table as cases (steps, blocks, rows) int32."""
        table = policy.table if policy.table.ndim == 3 else np.repeat(policy.table[:, :, None], self._rows, axis=2)
        if table.shape[1:] != (len(self._blocks), self._rows):
            raise PolicyError(
                f"the schedule is for {table.shape[1]} blocks and {table.shape[2]} rows, "
                f"the model has {len(self._blocks)} and the batch {self._rows}"
            )
        cases = np.empty(table.shape, dtype=np.int32)
        for index, block in enumerate(self._blocks):
            decisions = table[:, index].ravel().tolist()
            cases[:, index] = np.array([_case(block, d) for d in decisions]).reshape(-1, self._rows)
        return cases

    @staticmethod
    def _fill(there: Tensor, here: Tensor) -> None:
        there.copy_(here.pin_memory() if there.is_cuda else here, non_blocking=True)


def _case(block: BoundBlock, decision: float) -> int:
    if decision == SKIP:
        return SKIP_CASE
    return REUSE_CASE if decision == REUSE else COMPUTE_CASE + block.variant_for(decision)
