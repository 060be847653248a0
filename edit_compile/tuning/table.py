"""What tuning found, as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from edit_compile.bundles.tier_table import tier_table
from edit_compile.tuning.verdict import Verdict

if TYPE_CHECKING:
    from edit_compile.tuning.tuned import Tuned


def tables(tuned: Tuned) -> Group:
    """The tiers, and each of them beside plain sampling."""
    return Group(tier_table(tuned.tiers), against_fewer_steps(tuned))


def against_fewer_steps(tuned: Tuned) -> Table:
    """Each tier beside plain sampling: with as many steps as it computes, and with as many as take its time.

    The last column says which of it and the latter is better; below, which tiers are not worth having.
    """
    table = Table(title="beside fewer sampling steps, on the held-out generations")
    headings = ("tier", "steps computed", "dB", "dB of as many steps", "steps in its time", "better by, dB", "better")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for name, tier in tuned.tiers.items():
        gain, verdict = tuned.gain[name], tuned.verdict(name)
        numbers = f"{tier.quality_db or 0:.1f}", f"{tuned.fewer_steps[name].value:.1f}", str(tuned.steps_in_time[name])
        # beside all steps, which are the recording itself, a difference in dB says nothing
        told = "-" if verdict is Verdict.NOT_FASTER else f"{gain.value:.1f} ({gain.low:.1f} to {gain.high:.1f})"
        better = f"{tuned.steps_in_time[name]} {verdict}" if verdict is Verdict.FEWER_STEPS else str(verdict)
        table.add_row(name, str(tuned.computed_steps[name]), *numbers, told, better)
    table.caption = tuned.advice
    return table
