"""What evidence is made of: rows of benchmarks/results/{rivals,paper}.json, chosen and as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edit_compile.measuring.machine import summary

Row = Mapping[str, Any]
SAME_TIME = 0.98
"""A rival is as fast where its times faster are at least this part of what it is beside."""
OURS = ("tier", "tier, inductor", "elastic, distilled", "elastic, distilled, and reuse")
RULES = ("reuse at intervals", "blocks pruned")
"""Policies of this project that nothing was tuned for: beside tiers, not among rivals of other projects."""


def named(results: Row, *whos: str) -> list[Row]:
    """Rows of these."""
    return [one for one in results["results"] if one["who"] in whos]


def dense(rivals: Row) -> Row:
    """The dense model's row."""
    return named(rivals, "dense")[0]


def plain(one: Row) -> bool:
    """Whether it is sampling with fewer steps, by whatever kernels."""
    return "fewer steps" in one["who"]


def caches(one: Row) -> bool:
    """Whether it is another project's way, but for fewer steps."""
    return one["who"] != "dense" and one["who"] not in (*OURS, *RULES) and not plain(one)


def as_fast(other: Row, one: Row) -> bool:
    """Whether it takes no longer than `one`."""
    return bool(other["times_faster"] >= one["times_faster"] * SAME_TIME)


def beside(rivals: Row, one: Row, chosen: Callable[[Row], bool]) -> Row | None:
    """Of those `chosen` that take no longer than `one`, the one with most dB, among equal ones the fastest."""
    found = [other for other in rivals["results"] if chosen(other) and as_fast(other, one)]
    return max(found, key=lambda other: (round(other["decibels"], 1), other["times_faster"]), default=None)


def fastest(rivals: Row, tier: str) -> Row:
    """A tier's row on the engine on which it is fastest."""
    return max(
        (o for o in named(rivals, "tier", "tier, inductor") if o["settings"] == tier), key=lambda o: o["times_faster"]
    )


def cells(one: Row) -> tuple[str, ...]:
    """Of a table of all figures."""
    nearness = "-" if one["who"] == "dense" else measured(one, "decibels")
    share = f"{one['flops_share']:.0%}"
    return one["who"], one["settings"], share, times(one), nearness, measured(one, "distance"), accuracy(one)


def times(one: Row) -> str:
    """Times faster."""
    return f"{one['times_faster']:.2f}"


def accuracy(one: Row) -> str:
    """Accuracy, with its interval."""
    low, high = one["accuracy_interval"]
    return f"{one['accuracy']:.1%} ({low:.1%} to {high:.1%})"


def measured(one: Row, name: str, form: str = ".1f") -> str:
    """A figure with its interval."""
    return with_interval(one[name], one[f"{name}_interval"], form)


def with_interval(value: float, interval: Sequence[float], form: str = ".1f") -> str:
    """As text."""
    return f"{value:{form}} ({interval[0]:{form}} to {interval[1]:{form}})"


def machine(results: Row) -> str:
    """Where it was taken."""
    return f"{summary(results['machine'])}, {results['machine']['threads']} thread"


def in_short(other: Row | None) -> str:
    """Another's nearness, who it is, and its times faster."""
    if other is None:
        return "none"
    near = f"{other['decibels']:.1f} dB, distance {other['distance']:.1f}"
    return f"{near} of {other['who']}, {other['settings']} ({times(other)})"
