"""A bundle's tiers as a table, their policies in plain words."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from runtime.bundle.tiers import Tier
from runtime.routing.branched import BranchedPolicy
from runtime.routing.policy import SKIP, Decider, RoutingPolicy
from runtime.routing.reuse import ReusePolicy
from runtime.routing.schedule import ScheduledPolicy

HEADINGS = ("tier", "policy", "quality, dB", "times faster", "FLOPs of dense", "steps", "measured on")


def tier_table(tiers: Mapping[str, Tier[Decider]]) -> Table:
    """The tiers, a row each; a dash for what is not known. All but the policies is as predicted when they were made."""
    table = Table(title="tiers (figures as predicted when they were made)")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for name, tier in tiers.items():
        cells = (
            _quality(tier),
            "-" if tier.times_faster is None else f"{tier.times_faster:.2f}",
            "-" if tier.flops_share is None else f"{tier.flops_share:.0%}",
            "-" if tier.steps is None else str(tier.steps),
            tier.machine or "-",
        )
        table.add_row(name, in_words(tier.policy), *cells)
    return table


def in_words(policy: Decider) -> str:
    """What a policy does, in a few plain words."""
    if isinstance(policy, RoutingPolicy):
        return _routing(policy)
    if isinstance(policy, ScheduledPolicy):
        return _schedule(policy)
    if isinstance(policy, ReusePolicy):
        return _reuse(policy)
    if isinstance(policy, BranchedPolicy):
        told = "; ".join(f"{name}: {in_words(own)}" for name, own in policy.branches.items())
        return f"{told}; other branches: {in_words(policy.otherwise)}"
    return type(policy).__name__


def _routing(policy: RoutingPolicy) -> str:
    reuse = f"reuses up to {policy.threshold + policy.margin:g}, at most {_times(policy.max_reuse)} in a row"
    after = f", not in the first {_steps(policy.warmup_steps)}" if policy.warmup_steps else ""
    return f"routed: skips below {policy.threshold:g}" + (f", {reuse}{after}" if policy.max_reuse else "")


def _schedule(policy: ScheduledPolicy) -> str:
    table = policy.table
    computed, reused = float((table > SKIP).mean()), float((table < SKIP).mean())
    beyond = "computes" if policy.beyond == "compute" else "refuses"
    told = f"schedule of {_steps(len(table))}: {computed:.0%} computed"
    if computed:
        told += f" at mean width {table[table > SKIP].mean():.2g}"
    skipped = float((table == SKIP).mean())
    return f"{told}, {reused:.0%} reused, {skipped:.0%} skipped; {beyond} steps beyond"


def _reuse(policy: ReusePolicy) -> str:
    told = f"reuses {_times(policy.max_reuse)} in a row after {_steps(policy.warmup_steps)}"
    if policy.order:
        told += ", extrapolated"
    if policy.change is not None:
        watched = "its input" if policy.watches == "input" else "the first block"
        told += f", while {watched} changes by at most {policy.change:.2g} of itself"
    return told + ("; else computes" if policy.otherwise is None else f"; else {in_words(policy.otherwise)}")


def _quality(tier: Tier[Decider]) -> str:
    known = [] if tier.quality_db is None else [f"{tier.quality_db:.1f}"]
    if tier.quality_interval is not None:
        known.append("({:.1f} to {:.1f})".format(*tier.quality_interval))
    return " ".join(known) or "-"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
