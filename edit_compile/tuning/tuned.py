"""What tuning found: tiers, and beside each what as many sampling steps would give."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from edit_compile.calls.result_quality import Mean
from edit_compile.tuning.table import tables
from edit_compile.tuning.timing import Seconds
from edit_compile.tuning.verdict import Verdict
from runtime.bundle.tiers import Tier
from runtime.face.transformer import CompiledTransformer
from runtime.routing.policy import Decider

WIDTH = 160
"""Columns of the printed tables: a text does not know where it will be shown."""


@dataclass(frozen=True)
class Tuned:
    """Tiers, and what is known of them, by name.

    Args:
        tiers: with their predicted quality and speed.
        computed_steps: how many steps each computes.
        fewer_steps: quality in dB of sampling with so many steps instead.
        steps_in_time: how many plain sampling steps take no longer than the tier, which reuses at a cost.
        gain: by how many dB the tier is better than those, generation by generation.
        seconds: how long the calls of one generation took, on this machine.
    """

    tiers: Mapping[str, Tier[Decider]]
    computed_steps: Mapping[str, int]
    fewer_steps: Mapping[str, Mean]
    steps_in_time: Mapping[str, int]
    gain: Mapping[str, Mean]
    seconds: Mapping[str, Seconds]

    def __str__(self) -> str:
        """The tables that `edit-compile tune` prints."""
        console = Console(file=io.StringIO(), width=WIDTH)
        with console.capture() as captured:
            console.print(tables(self))
        return captured.get()

    def verdict(self, name: str) -> Verdict:
        """Whether the tier `name` is better than plain steps in its time."""
        gain = self.gain[name]
        if gain.value == 0:
            return Verdict.EQUAL
        if self.steps_in_time[name] == self.tiers[name].steps:
            return Verdict.NOT_FASTER
        return Verdict.TIER if gain.low > 0 else Verdict.FEWER_STEPS if gain.high < 0 else Verdict.UNDECIDED

    @property
    def advice(self) -> str | None:
        """Which tiers are not worth having, and of which that is not known; None where all are."""
        named: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
        for name in self.gain:
            named[self.verdict(name)].append(name)
        worse = [f"{name} (sample with {self.steps_in_time[name]} steps)" for name in named[Verdict.FEWER_STEPS]]
        slow = named[Verdict.NOT_FASTER]
        unsure = [f"{name} ({self.steps_in_time[name]})" for name in named[Verdict.UNDECIDED]]
        told = [f"plain fewer steps are better than {', '.join(worse)}: do not use these tiers"] * bool(worse)
        told += [f"computing every step takes no longer than {', '.join(slow)}: do not use these tiers"] * bool(slow)
        told += [f"undecided beside as many plain steps as take the tier's time: {', '.join(unsure)}; record more "
                 "generations"] * bool(unsure)  # fmt: skip
        return "; ".join(told) or None

    def add_to(self, compiled: CompiledTransformer) -> None:
        """Give `compiled` the tiers; `compiled.save` writes them into the bundle."""
        for name, tier in self.tiers.items():
            compiled.add_tier(name, tier)

    def plot(self, path: str | Path) -> Path:
        """Draw quality against time, tiers and fewer steps, as the image `path`, whose suffix names the format."""
        from edit_compile.measuring.plot import save
        from edit_compile.tuning.plot import quality_against_time

        return save(quality_against_time(self), path)
