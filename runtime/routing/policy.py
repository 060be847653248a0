"""What is done with each row of a block: skip, reuse or compute, and at which width.

A decision is a float: `SKIP` (0.0, no width at all), `REUSE` (-1.0) or the width (0, 1] to compute
at. Policies decide on small host lists, one entry per row of the batch, in plain Python: for a
handful of rows this is quicker than any array library.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.base.errors import PolicyError
from runtime.bundle import spec

SKIP = 0.0
REUSE = -1.0
EMPTY = -1
"""Number of reuses of a row whose residual bank is empty."""


class Decider(Protocol):
    """What a compiled transformer asks of its policy."""

    @property
    def reuses(self) -> bool:
        """Whether `decide` may answer REUSE; if not, no residuals are kept."""

    @property
    def routed(self) -> bool:
        """Whether the routers are run."""

    def decide(
        self, step: int, block: int, gate: Sequence[float], width: Sequence[float], held: Sequence[int]
    ) -> list[float]:
        """One decision per row.

        `step` counts the denoising steps of the request from 0, `block` the blocks of the model.
        Per row: `gate` is p (equation 10), `width` the width the router chose (equation 12),
        `held` how often the row's residual was reused since it was computed, EMPTY if there is
        none.
        """


def keeps_residuals(policy: Decider, gated: bool) -> bool:
    """Whether `policy` may come to reuse; without routers (not `gated`) every p is 1."""
    if gated or not isinstance(policy, RoutingPolicy):
        return policy.reuses
    return policy.reuses and policy.threshold + policy.margin >= 1.0


@dataclass(frozen=True)
class RoutingPolicy:
    """Algorithm 1 of the paper: decisions from the routers' gates.

    Below `threshold` (tau) a block is skipped; up to ``threshold + margin`` its last residual is
    reused, at most `max_reuse` (K) times in a row; otherwise it is computed. In the first
    `warmup_steps` steps of a request nothing is reused (blocks are still skipped). Raises
    PolicyError for a threshold or margin outside [0, 1] or a negative count.
    """

    threshold: float = 0.5
    margin: float = 0.1
    max_reuse: int = 5
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("threshold", "margin"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise PolicyError(f"{name} is a probability between 0 and 1, not {value!r}")
        for name in ("max_reuse", "warmup_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise PolicyError(f"{name} is a whole number of at least 0, not {value!r}")

    @classmethod
    def preset(cls, name: str) -> RoutingPolicy:
        """The paper's setting for "flux", "qwen-image-base", "qwen-image-turbo" or "hunyuan3d"."""
        if name not in _PRESETS:
            raise PolicyError(f"no preset {name!r}; there are {', '.join(sorted(_PRESETS))}")
        margin, max_reuse = _PRESETS[name]
        return cls(margin=margin, max_reuse=max_reuse)

    @classmethod
    def stored(cls, policy: spec.Policy) -> RoutingPolicy:
        """The policy that a manifest holds."""
        return cls(policy.threshold, policy.margin, policy.max_reuse, policy.warmup_steps)

    def to_spec(self) -> spec.Policy:
        """The form in which a manifest holds it."""
        return spec.Policy(self.threshold, self.margin, self.max_reuse, self.warmup_steps)

    @property
    def reuses(self) -> bool:
        """Whether a residual can ever be reused."""
        return self.max_reuse > 0

    @property
    def routed(self) -> bool:
        """The routers are always run: the decisions are theirs."""
        return True

    def decide(
        self, step: int, block: int, gate: Sequence[float], width: Sequence[float], held: Sequence[int]
    ) -> list[float]:
        """Algorithm 1, row by row (see Decider.decide)."""
        threshold, top = self.threshold, self.threshold + self.margin
        limit = self.max_reuse if step >= self.warmup_steps else 0
        return [
            SKIP if p < threshold else REUSE if p <= top and 0 <= k < limit else w
            for p, w, k in zip(gate, width, held, strict=True)
        ]


_PRESETS = {
    "flux": (0.10, 3),
    "qwen-image-base": (0.10, 5),
    "qwen-image-turbo": (0.15, 10),
    "hunyuan3d": (0.15, 5),
}


@dataclass(frozen=True, eq=False)
class ScheduledPolicy:
    """Decisions given in advance: for ablations, static schedules, and timing of random weights.

    `table` holds a decision for each (step, block), or (step, block, row): SKIP, REUSE or a width
    in (0, 1]. A row that is to reuse while its bank is empty computes at full width instead. With
    `routed` the routers run all the same, so that a timed call does all the work of a routed one.
    Raises PolicyError for a table of another form.
    """

    table: npt.NDArray[np.float64]
    routed: bool = True

    def __post_init__(self) -> None:
        table = np.array(self.table, dtype=np.float64)
        if table.ndim not in (2, 3) or not table.size:
            raise PolicyError(f"a schedule has the shape (steps, blocks[, rows]), not {table.shape}")
        if not (((table >= 0.0) & (table <= 1.0)) | (table == REUSE)).all():
            raise PolicyError("a schedule holds SKIP (0), REUSE (-1) or a width up to 1")
        table.setflags(write=False)
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "_rows", table.tolist())
        object.__setattr__(self, "_reuses", bool((table == REUSE).any()))

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
    def reuses(self) -> bool:
        """Whether the schedule reuses anywhere."""
        return bool(self._reuses)  # type: ignore[attr-defined]

    def decide(
        self, step: int, block: int, gate: Sequence[float], width: Sequence[float], held: Sequence[int]
    ) -> list[float]:
        """The table's entry, for every row (see Decider.decide); PolicyError outside the table."""
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
        return [1.0 if d == REUSE and k == EMPTY else d for d, k in zip(planned, held, strict=True)]


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
