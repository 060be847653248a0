"""Reuse by schedule or by change, beside what any other policy decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.base.errors import PolicyError
from runtime.routing.branched import BranchedPolicy
from runtime.routing.policy import EXTRAPOLATE, REUSE, SKIP, Decider, Watched, check_counts

DEEPEST = 16
"""Policies of reuse in each other at most: Python's calls go no deeper than some hundreds."""


@dataclass(frozen=True)
class ReusePolicy:
    """Reuses what a row of a block last added to its states, up to `max_reuse` times in a row, then computes it again.

    So `max_reuse=2` computes every third step. With `change`, a row reuses only while what the policy `watches` has
    changed by no more than that since the row's residual was computed, as a part of its size (mean absolute values):
    the "input" of the block itself, or the residual of the "first block" of the model, which is then computed in every
    step, unless `otherwise` skips or reuses it (then all is computed). In the first `warmup_steps` steps nothing is
    reused. Of `order` 0 the residual is the last one computed; of order 1 it is moved on in a straight line from the
    last two, by the timestep (EXTRAPOLATE).

    What is not reused is decided by `otherwise`: skipped, computed at a width, or reused by its own reasons, then of
    the higher order of both. Without it all is computed at full width, and no routers run.

    Raises PolicyError for a negative number, an order that is neither 0 nor 1, something unknown to watch, or more than
    16 policies in each other.
    """

    max_reuse: int
    change: float | None = None
    watches: Watched | None = None
    warmup_steps: int = 1
    order: int = 0
    otherwise: Decider | None = None

    def __post_init__(self) -> None:
        check_counts(max_reuse=self.max_reuse, warmup_steps=self.warmup_steps)
        if self.order not in (0, 1):
            raise PolicyError(f"order is 0 or 1, not {self.order!r}")
        if self.watches not in (None, "input", "first block"):
            raise PolicyError(f"watches is 'input' or 'first block', not {self.watches!r}")
        if (self.change is None) != (self.watches is None):
            raise PolicyError("change and watches go together: how much of a change is too much, and of what")
        if self.change is not None and not 0.0 <= self.change < math.inf:
            raise PolicyError(f"change is a part of what is watched, at least 0, not {self.change!r}")
        if isinstance(self.otherwise, BranchedPolicy):
            raise PolicyError("otherwise is a BranchedPolicy: put that around policies of reuse, one for each branch")
        if self.otherwise is not None and self.otherwise.watches is not None:
            raise PolicyError("otherwise watches something, too: one policy of the two may")
        depth, inner = 1, self.otherwise
        while isinstance(inner, ReusePolicy):
            depth, inner = depth + 1, inner.otherwise
        if depth > DEEPEST:
            raise PolicyError(f"otherwise: policies of reuse lie in each other more than {DEEPEST} deep")

    @property
    def keeps(self) -> int:
        """One residual, two where it extrapolates; none where nothing is ever reused."""
        inner = 0 if self.otherwise is None else self.otherwise.keeps
        return max(inner, 1 + self.order) if self.max_reuse or inner else 0

    @property
    def routed(self) -> bool:
        """Whether `otherwise` runs the routers."""
        return self.otherwise is not None and self.otherwise.routed

    def decide(
        self,
        step: int,
        block: int,
        gate: Sequence[float],
        width: Sequence[float],
        held: Sequence[int],
        change: Sequence[float],
    ) -> list[float]:
        """Reuse where it may be, else what `otherwise` decides, row by row (see Decider.decide)."""
        if self.otherwise is None:
            decided = list(width)
        else:
            decided = self.otherwise.decide(step, block, gate, width, held, change)
        reused = EXTRAPOLATE if self.order else REUSE
        most = self.max_reuse if step >= self.warmup_steps else 0
        bound = math.inf if self.change is None else self.change
        return [
            min(reused, d) if d < SKIP or (d > SKIP and 0 <= k < most and moved <= bound) else d
            for d, k, moved in zip(decided, held, change, strict=True)
        ]
