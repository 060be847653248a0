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

    def verdict(self, name: str) -> str:
        """Whether the tier `name` is better than plain steps in its time: "equal", "the tier", "undecided" where the
        interval of the gain holds 0, "N STEPS INSTEAD", or "NOT FASTER" where all steps fit in its time."""
        gain, rival = self.gain[name], self.steps_in_time[name]
        if gain.value == 0:
            return "equal"
        if rival == self.tiers[name].steps:
            return "NOT FASTER"
        return "the tier" if gain.low > 0 else f"{rival} STEPS INSTEAD" if gain.high < 0 else "undecided"

    @property
    def advice(self) -> str | None:
        """Which tiers are not worth having, and of which that is not known; None where all are."""
        verdicts = {name: self.verdict(name) for name in self.gain}
        worse = [
            f"{name} (sample with {self.steps_in_time[name]} steps)" for name in verdicts if "INSTEAD" in verdicts[name]
        ]
        slow = [name for name in verdicts if verdicts[name] == "NOT FASTER"]
        unsure = [f"{name} ({self.steps_in_time[name]})" for name in verdicts if verdicts[name] == "undecided"]
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
