"""By how much rows have changed since their residuals were computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.base.rows import one_row
from runtime.base.transfer import to_host
from runtime.requests.bank import Residuals
from runtime.routing.policy import Watched

Signal = tuple[Tensor, ...]
"""What is watched of a row: copies of a block's input states, or of what the first block added to them."""


class Watch:
    """What a policy watches in one call of the model, guard after guard.

    Change is the mean absolute difference between what is watched now and what it was when a row's residual was
    computed, as a part of that one's mean absolute value.
    """

    def __init__(self, what: Watched | None) -> None:
        self._what = what
        self._first: Residuals | None = None
        self._now: list[Signal | None] = []
        self._found: dict[tuple[int, int], float] = {}  # of the first block: many blocks ask for the same

    def change(self, bank: Residuals, states: Sequence[Tensor], dims: Sequence[int]) -> list[float]:
        """Of every row of a block with `states`; infinite where it is not known. Synchronises with the device."""
        rows = len(bank.held)
        if self._what not in (None, bank.watched):  # by another policy, or by none: what it noted is something else
            bank.watched, bank.signals = self._what, [None] * rows
        if self._what is None or (self._what == "first block" and self._first is None):
            return [math.inf] * rows
        if self._what == "input":
            self._found, self._now = {}, [tuple(one_row(states, dims, row)) for row in range(rows)]
        if len(self._now) != rows:  # a block that sees another batch than the first
            return [math.inf] * rows
        asked = {}
        for row, (now, then) in enumerate(zip(self._now, bank.signals, strict=True)):
            if now is not None and then is not None and (row, id(then)) not in self._found:
                asked[row, id(then)] = _relative(now, then)
        if asked:
            self._found |= dict(zip(asked, to_host(torch.stack(list(asked.values()))), strict=True))
        return [self._found.get((row, id(then)), math.inf) for row, then in enumerate(bank.signals)]

    def computed(self, bank: Residuals, dims: Sequence[int], rows: Sequence[int]) -> None:
        """Remember what is watched for `rows` of a block, whose residuals `bank` has just taken in."""
        if self._what == "first block" and self._first in (None, bank):
            self._first = bank
            self._now = self._now or [None] * len(bank.held)
            for row in rows:
                self._now[row] = tuple(delta.clone() for delta in one_row(bank.deltas, dims, row))
        elif self._what is not None:
            copied = self._what == "input"
            for row in rows:
                now = self._now[row] if len(self._now) == len(bank.held) else None
                bank.signals[row] = tuple(one.clone() for one in now) if copied and now is not None else now

    def passed(self, bank: Residuals) -> None:
        """A guard was answered from `bank`; the first of a call is that of the first block."""
        if self._first is None:
            self._first, self._now = bank, self._now or [None] * len(bank.held)


def _relative(now: Signal, then: Signal) -> Tensor:
    moved = sum((a.float() - b.float()).abs().sum() for a, b in zip(now, then, strict=True))
    return torch.as_tensor(moved / sum(b.float().abs().sum() for b in then))
