"""What is done with each row of a block: skip, reuse or compute, and at which width.

A decision is a float: `SKIP` (0.0, no width at all), `REUSE` (-1.0) or `EXTRAPOLATE` (-2.0) the last residual, or the
width (0, 1] to compute at. Policies decide on small host lists, one entry per row of the batch, in plain Python: for a
handful of rows this is quicker than any array library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from runtime.base.errors import PolicyError
from runtime.bundle import spec

SKIP = 0.0
REUSE = -1.0
EXTRAPOLATE = -2.0
"""Reuse, moved on linearly in the timestep from the last two residuals; as REUSE where there is one."""
EMPTY = -1
"""Number of reuses of a row whose residual bank is empty."""


Watched = Literal["input", "first block"]


class Decider(Protocol):
    """What a compiled transformer asks of its policy."""

    @property
    def keeps(self) -> int:
        """How many residuals of a row `decide` may need: none, 1 for REUSE, 2 for EXTRAPOLATE."""

    @property
    def watches(self) -> Watched | None:
        """What `decide` is told the change of."""

    @property
    def routed(self) -> bool:
        """Whether the routers are run."""

    def decide(
        self,
        step: int,
        block: int,
        gate: Sequence[float],
        width: Sequence[float],
        held: Sequence[int],
        change: Sequence[float],
    ) -> list[float]:
        """One decision per row.

        `step` counts the denoising steps of the request from 0, `block` the blocks of the model.
        Per row: `gate` is p (equation 10), `width` the width the router chose (equation 12),
        `held` how often the row's residual was reused since it was computed, EMPTY if there is
        none, `change` by how much what the policy `watches` has changed since then, as a part of
        it; infinite where that is not known.
        """


def residuals_kept(policy: Decider, gated: bool) -> int:
    """How many residuals `policy` may come to need; without routers (not `gated`) every p is 1."""
    if not gated and isinstance(policy, RoutingPolicy) and policy.threshold + policy.margin < 1.0:
        return 0
    return policy.keeps


def check_counts(**counts: object) -> None:
    """PolicyError for one that is no whole number of at least 0."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise PolicyError(f"{name} is a whole number of at least 0, not {value!r}")


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
        check_counts(max_reuse=self.max_reuse, warmup_steps=self.warmup_steps)

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
    def keeps(self) -> int:
        """A residual, where it can ever be reused."""
        return int(self.max_reuse > 0)

    @property
    def watches(self) -> None:
        """Nothing."""

    @property
    def routed(self) -> bool:
        """The routers are always run: the decisions are theirs."""
        return True

    def decide(
        self,
        step: int,
        block: int,
        gate: Sequence[float],
        width: Sequence[float],
        held: Sequence[int],
        change: Sequence[float] = (),
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
