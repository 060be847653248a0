"""Decisions given in advance."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.base.errors import PolicyError
from runtime.bundle.tiers import Beyond
from runtime.routing.policy import EMPTY, EXTRAPOLATE, REUSE, SKIP


@dataclass(frozen=True, eq=False)
class ScheduledPolicy:
    """Decisions given in advance: for ablations, static schedules, and timing of random weights.

    `table` holds a decision for each (step, block), or (step, block, row): SKIP (0), REUSE (-1),
    EXTRAPOLATE (-2) or a width in (0, 1]. A row that is to reuse while its bank is empty computes at full
    width instead. With `routed` the routers run all the same, so that a timed call does all the work of a
    routed one. Steps `beyond` the table are refused with a PolicyError, or computed at full width ("compute"), which
    each policy warns of once. Two schedules are equal where all of this is.

    Raises PolicyError for a table of another form, or another word for `beyond`.
    """

    table: npt.NDArray[np.float64]
    routed: bool = True
    beyond: Beyond = "refuse"

    def __post_init__(self) -> None:
        try:
            table = np.array(self.table, dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise PolicyError(f"a schedule has the shape (steps, blocks[, rows]): {error}") from error
        if self.beyond not in ("refuse", "compute"):
            raise PolicyError(f"beyond is 'refuse' or 'compute', not {self.beyond!r}")
        if table.ndim not in (2, 3) or not table.size:
            raise PolicyError(f"a schedule has the shape (steps, blocks[, rows]), not {table.shape}")
        reused = (table == REUSE) | (table == EXTRAPOLATE)
        if not (((table >= 0.0) & (table <= 1.0)) | reused).all():
            raise PolicyError("a schedule holds SKIP (0), REUSE (-1), EXTRAPOLATE (-2) or a width up to 1")
        table.setflags(write=False)
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "_rows", table.tolist())
        object.__setattr__(self, "_keeps", int(-table.min(initial=0.0)))
        object.__setattr__(self, "_warned", False)

    def __eq__(self, other: object) -> bool:
        if self is other or type(other) is not type(self):
            return self is other
        assert isinstance(other, ScheduledPolicy)
        same = (self.routed, self.beyond) == (other.routed, other.beyond)
        return same and np.array_equal(self.table, other.table)

    def __hash__(self) -> int:
        return hash((self.table.shape, self.routed, self.beyond))

    @classmethod
    def at_budget(
        cls,
        steps: int,
        blocks: int,
        gate: float = 0.5,
        width: float = 0.6,
        seed: int = 0,
        *,
        widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    ) -> ScheduledPolicy:
        """A random schedule that computes a share `gate` of all blocks at a mean width of `width`.

        The blocks computed are spread evenly over the steps and drawn at random within each; their
        widths are drawn from all of `widths`. Both shares are met as closely as whole blocks and
        the given widths allow.
        """
        if not 0.0 <= gate <= 1.0 or not min(widths) <= width <= max(widths):
            raise PolicyError(f"no schedule computes {gate} of the blocks at mean width {width} of {tuple(widths)}")
        draw = random.Random(seed)
        total = round(gate * steps * blocks)
        drawn = iter(_draw_widths(draw, total, width, sorted(widths)))
        table = np.zeros((steps, blocks))
        for step in range(steps):
            count = total * (step + 1) // steps - total * step // steps
            for block in draw.sample(range(blocks), count):
                table[step, block] = next(drawn)
        return cls(table)

    @property
    def keeps(self) -> int:
        """As many residuals as the schedule reuses from anywhere."""
        return int(self._keeps)  # type: ignore[attr-defined]

    @property
    def watches(self) -> None:
        """Nothing."""

    def decide(
        self,
        step: int,
        block: int,
        gate: Sequence[float],
        width: Sequence[float],
        held: Sequence[int],
        change: Sequence[float] = (),
    ) -> list[float]:
        """The table's entry, for every row (see Decider.decide); PolicyError outside the table, but for `beyond`."""
        if self.beyond == "compute" and step >= len(self.table) and block < self.table.shape[1]:
            self._warn_once()
            return [1.0] * len(held)
        try:
            entry = self._rows[step][block]  # type: ignore[attr-defined]
        except IndexError:
            steps, blocks = self.table.shape[:2]
            raise PolicyError(
                f"the schedule covers {steps} steps of {blocks} blocks; asked for step {step}, block {block}"
            ) from None
        planned = [entry] * len(held) if isinstance(entry, float) else entry
        if len(planned) != len(held):
            raise PolicyError(f"the schedule is for {len(planned)} rows, the batch has {len(held)}")
        return [1.0 if d < SKIP and k == EMPTY else d for d, k in zip(planned, held, strict=True)]

    def _warn_once(self) -> None:
        if self._warned:  # type: ignore[attr-defined]
            return
        object.__setattr__(self, "_warned", True)
        warnings.warn(
            f"the schedule was made for {len(self.table)} steps, and a generation has more: in those beyond them every "
            "block is computed in full; choose a tier that was made for as many steps",
            RuntimeWarning,
            stacklevel=2,
        )


def _draw_widths(draw: random.Random, count: int, mean: float, widths: Sequence[float]) -> list[float]:
    """`count` of `widths` at random, moved one at a time until their mean is as near as can be."""
    drawn = draw.choices(widths, _tilted(widths, mean), k=count)
    while drawn:
        excess = sum(drawn) - count * mean
        left, old, new = min((abs(excess + new - old), old, new) for old in set(drawn) for new in widths)
        if left >= abs(excess) - 1e-9:
            break
        drawn[draw.choice([i for i, w in enumerate(drawn) if w == old])] = new
    return drawn


def _tilted(widths: Sequence[float], mean: float) -> list[float]:
    """Probabilities exp(b w) of `widths` whose mean is `mean`: the evenest spread that has it."""
    low, high = -200.0, 200.0
    for _ in range(60):
        tilt = (low + high) / 2
        weights = [math.exp(tilt * (w - 1)) if tilt > 0 else math.exp(tilt * (w - widths[0])) for w in widths]
        if sum(w * p for w, p in zip(widths, weights, strict=True)) / sum(weights) < mean:
            low = tilt
        else:
            high = tilt
    return weights
