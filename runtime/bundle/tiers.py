"""Tiers as a manifest holds them: a policy as plain data, and what is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import msgspec

from runtime.base.errors import PolicyError

Beyond = Literal["refuse", "compute"]

P = TypeVar("P")


class StoredRouting(msgspec.Struct, frozen=True, tag_field="kind", tag="routing"):
    """The fields of `runtime.routing.policy.RoutingPolicy`."""

    threshold: float
    margin: float
    max_reuse: int
    warmup_steps: int


class StoredSchedule(msgspec.Struct, frozen=True, tag_field="kind", tag="schedule"):
    """The fields of `runtime.routing.schedule.ScheduledPolicy`; a step is a list of blocks, those numbers, or rows."""

    table: tuple[tuple[float | tuple[float, ...], ...], ...]
    routed: bool
    beyond: Beyond


class StoredReuse(msgspec.Struct, frozen=True, tag_field="kind", tag="reuse"):
    """The fields of `runtime.routing.reuse.ReusePolicy`."""

    max_reuse: int
    change: float | None
    watches: Literal["input", "first block"] | None
    warmup_steps: int
    order: int
    otherwise: StoredRouting | StoredSchedule | StoredReuse | None


class StoredBranches(msgspec.Struct, frozen=True, tag_field="kind", tag="branches"):
    """The fields of `runtime.routing.branched.BranchedPolicy`."""

    branches: dict[str, StoredRouting | StoredSchedule | StoredReuse]
    otherwise: StoredRouting | StoredSchedule | StoredReuse


StoredPolicy = StoredRouting | StoredSchedule | StoredReuse | StoredBranches


@dataclass(frozen=True)
class Tier(Generic[P]):
    """A policy, and what is known of it before it runs; None where that is not known.

    Args:
        policy: what decides. In a manifest it is a StoredPolicy.
        quality_db: predicted quality in dB.
        quality_interval: (low, high) in dB, what that quality lies in.
        times_faster: predicted time of the dense model / that of this tier.
        flops_share: share of the dense model's FLOPs that are done, 0 to 1.
        steps: sampling steps of the generations that it was made for.
        machine: where it was measured.

    Raises PolicyError, naming the field, for a value that makes no sense.
    """

    policy: P
    quality_db: float | None = None
    quality_interval: tuple[float, float] | None = None
    times_faster: float | None = None
    flops_share: float | None = None
    steps: int | None = None
    machine: str | None = None

    def __post_init__(self) -> None:
        for name in ("quality_db", "times_faster", "flops_share"):
            if getattr(self, name) is not None:
                self._put(name, _finite(name, getattr(self, name)))
        if self.quality_interval is not None:
            self._put("quality_interval", _interval(self.quality_interval, self.quality_db))
        if self.times_faster is not None and self.times_faster <= 0.0:
            raise PolicyError(f"times_faster is above 0, not {self.times_faster!r}")
        if self.flops_share is not None and not 0.0 <= self.flops_share <= 1.0:
            raise PolicyError(f"flops_share is a share between 0 and 1, not {self.flops_share!r}")
        steps = self.steps
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise PolicyError(f"steps is a whole number of at least 1, not {steps!r}")
        if not isinstance(self.machine, (str, type(None))):
            raise PolicyError(f"machine is a text, not {self.machine!r}")

    def _put(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def explain_tiers(manifest: object) -> str | None:
    """What keeps a tier of a parsed `manifest` from being read, tier and field named; None where nothing does."""
    tiers = manifest.get("tiers") if isinstance(manifest, dict) else None
    for name, tier in tiers.items() if isinstance(tiers, dict) else ():
        try:
            msgspec.convert(tier, Tier[StoredPolicy])
        except msgspec.ValidationError as error:
            return f"tier {name!r}: {error}"
    return None


def _finite(name: str, value: Any) -> float:
    """`value` as a plain float; PolicyError where it is none, or not finite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, (str, bool)) or not math.isfinite(number):
        raise PolicyError(f"{name} is a finite number, not {value!r}")
    return number


def _interval(given: Any, inside: float | None) -> tuple[float, float]:
    """(low, high); PolicyError where it is none, or where `inside` is not."""
    try:
        low, high = (_finite("quality_interval", bound) for bound in given)
    except (TypeError, ValueError):
        raise PolicyError(f"quality_interval is (low, high) in dB, not {given!r}") from None
    if not low <= (low if inside is None else inside) <= high:
        told = "holds the quality" if inside is not None else "ascends"
        raise PolicyError(f"quality_interval {told}, which {(low, high)} does not")
    return low, high
