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

    @property
    def advice(self) -> str | None:
        """Which tiers are not worth having, since plain sampling with fewer steps is better; None where all are."""
        worse = [name for name, gain in self.gain.items() if gain.value < 0]
        told = ", ".join(f"{name} (sample with {self.steps_in_time[name]} steps)" for name in worse)
        return f"plain fewer steps are better than {told}: do not use these tiers" if worse else None

    def add_to(self, compiled: CompiledTransformer) -> None:
        """Give `compiled` the tiers; `compiled.save` writes them into the bundle."""
        for name, tier in self.tiers.items():
            compiled.add_tier(name, tier)

    def plot(self, path: str | Path) -> Path:
        """Draw quality against time, tiers and fewer steps, as the image `path`, whose suffix names the format."""
        from edit_compile.measuring.plot import save
        from edit_compile.tuning.plot import quality_against_time

        return save(quality_against_time(self), path)
