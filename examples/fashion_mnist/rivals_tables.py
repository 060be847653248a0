"""What `rivals` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from examples.fashion_mnist.finals import Held, Result


def table_of(results: Sequence[Result], caption: str) -> Table:
    """All finalists."""
    table = Table(
        "FLOPs at most", "who", "settings", "FLOPs", "times faster", "dB", "distance", "accuracy", caption=caption
    )
    for one in results:
        low, high = one.decibels_interval
        near, far = one.distance_interval
        table.add_row(
            f"{one.at:.0%}", one.who, one.settings, f"{one.flops_share:.0%}", f"{one.times_faster:.2f}",
            f"{one.decibels:.1f} ({low:.1f} to {high:.1f})", f"{one.distance:.1f} ({near:.1f} to {far:.1f})",
            f"{one.accuracy:.1%}",
        )  # fmt: skip
    return table


def held_table(held: Sequence[Held]) -> Table:
    """What tuning predicted, beside what came."""
    table = Table("tier", "predicted dB of a generation", "found", "means in the interval")
    for one in held:
        low, high = one.interval
        predicted = f"{one.predicted:.1f} ({low:.1f} to {high:.1f})"
        table.add_row(one.tier, predicted, f"{one.found:.1f}", f"{one.within:.0%} of those of {one.grouped}")
    return table
