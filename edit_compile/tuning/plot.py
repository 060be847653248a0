"""A picture to choose a tier from: quality against time, beside plain fewer steps."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.axes
from matplotlib.figure import Figure

from edit_compile.calls.result_quality import Mean
from edit_compile.tuning.tuned import Tuned

Point = tuple[str, float, Mean]
"""What is written beside it, seconds, and dB."""


def quality_against_time(tuned: Tuned) -> Figure:
    """Tiers and as many sampling steps as two lines, with intervals, over measured seconds of a generation's calls.

    What computes everything is what was recorded itself, and left out; dense is where the dashed line is.
    """
    tiers, fewer = list[Point](), list[Point]()
    for name, tier in tuned.tiers.items():
        if tier.quality_db is None or tier.quality_interval is None or tuned.computed_steps[name] == tier.steps:
            continue
        seconds = tuned.seconds[name]
        tiers.append((name, seconds.tier, Mean(tier.quality_db, *tier.quality_interval)))
        fewer.append((f"{tuned.computed_steps[name]} steps", seconds.fewer_steps, tuned.fewer_steps[name]))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    _draw(axes, tiers, "tiers", "#1d4f91", above=True)
    _draw(axes, fewer, "as many sampling steps instead", "#c0392b", above=False)
    dense = [seconds.dense for seconds in tuned.seconds.values()]
    if dense:
        axes.axvline(sorted(dense)[len(dense) // 2], color="#777", linestyle="--", label="dense")
        axes.legend(loc="best", fontsize="small")
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of a generation's calls of the transformer, measured")
    axes.set_ylabel("PSNR to what was recorded, dB (95%)")
    machines = {tier.machine for tier in tuned.tiers.values() if tier.machine}
    axes.set_title("; ".join(sorted(machines)), fontsize="small")
    return figure


def _draw(axes: matplotlib.axes.Axes, points: Sequence[Point], label: str, color: str, above: bool) -> None:
    ordered = sorted({(seconds, mean.value): (name, seconds, mean) for name, seconds, mean in points}.values(),
                     key=lambda point: point[1])  # fmt: skip
    if not ordered:
        return
    means = [mean for _, _, mean in ordered]
    values = [mean.value for mean in means]
    reach = [[mean.value - mean.low for mean in means], [mean.high - mean.value for mean in means]]
    axes.errorbar(
        [seconds for _, seconds, _ in ordered], values, yerr=reach, label=label, color=color, marker="o", capsize=3
    )
    for name, seconds, mean in ordered:
        axes.annotate(
            name, (seconds, mean.value), xytext=(6, 6 if above else -14), textcoords="offset points", color=color
        )
