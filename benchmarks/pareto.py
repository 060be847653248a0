"""The README's picture, from benchmarks/results/rivals.json: quality against times faster."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.axes
from matplotlib.figure import Figure

from edit_compile.measuring.machine import summary

STYLES = {
    ("tier, inductor", "tier"): ("tiers of edit_compile", "#1d4f91", "o", "-"),
    ("torch.compile, fewer steps", "fewer steps, compiled"): ("fewer steps", "#c0392b", "s", "-"),
    ("TaylorSeer, torch.compile", "TaylorSeer"): ("TaylorSeer", "#2e8b57", "^", "--"),
    ("MagCache, torch.compile", "MagCache"): ("MagCache", "#8e6bbf", "v", "--"),
    ("FirstBlockCache",): ("FirstBlockCache", "#b8860b", "D", ":"),
    ("DBCache",): ("DBCache of cache-dit", "#7f7f7f", "P", ":"),
    ("elastic, distilled",): ("distilled by edit_compile", "#17a2c4", "*", "-"),
}
"""By whom rows are, the first of them that there is: what it is called in the picture, and how it is drawn."""
KERNELS = ("inductor", "torch.compile")
PANELS = (
    ("decibels", "PSNR to the dense model's images, dB (higher is better)"),
    ("distance", "Frechet distance to real images (lower is better)"),
)


def pareto(rivals: Mapping[str, Any]) -> Figure:
    """A panel for each measure of quality, with intervals of 95%; a line for each way to save compute."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for axes, (measure, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for whos, (name, color, marker, line) in STYLES.items():
            rows = _rows(rivals, whos)
            on = next((f", {kernels}" for kernels in KERNELS if rows and kernels in rows[0]["who"]), "")
            _draw(axes, rows, measure, {"label": name + on, "color": color, "marker": marker, "linestyle": line})
        axes.set_xlabel("times faster than the dense model in 28 steps, eager")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.set_xlim(left=1)
    dense = next(one for one in rivals["results"] if one["who"] == "dense")
    axes.axhline(dense["distance"], color="#333", linewidth=1, linestyle="--", label="dense, 28 steps")
    axes.set_ylim(top=32)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    figure.suptitle(
        f"Fashion-MNIST, {rivals['images']} images a point; {summary(rivals['machine'])}", fontsize="medium"
    )
    return figure


def _rows(rivals: Mapping[str, Any], whos: Sequence[str]) -> list[Mapping[str, Any]]:
    """Of the first of `whos` that there is, what saves compute."""
    found = ([one for one in rivals["results"] if one["who"] == who and one["flops_share"] < 0.99] for who in whos)
    return next(filter(None, found), [])


def _draw(
    axes: matplotlib.axes.Axes, rows: Sequence[Mapping[str, Any]], measure: str, style: Mapping[str, str]
) -> None:
    ordered = sorted({(one["times_faster"], *_spread(one, measure)) for one in rows})
    if ordered:
        times, values, below, above = zip(*ordered, strict=True)
        axes.errorbar(times, values, yerr=(below, above), capsize=2, markersize=6, linewidth=1.5, **style)


def _spread(one: Mapping[str, Any], measure: str) -> tuple[float, float, float]:
    low, high = one[f"{measure}_interval"]
    return one[measure], one[measure] - low, high - one[measure]


def shown(rivals: Mapping[str, Any]) -> str:
    """All that is drawn, as text."""
    measures = [name for measure, _ in PANELS for name in (measure, f"{measure}_interval")]
    rows = [one for whos in (*STYLES, ("dense",)) for one in rivals["results"] if one["who"] in whos]
    return json.dumps([{name: one[name] for name in ("who", "settings", "times_faster", *measures)} for one in rows])


def write(rivals: Mapping[str, Any], path: Path) -> None:
    """As an image, the same for the same results, which names what it was drawn from by a hash."""
    told = {"Date": None, "Description": hashlib.sha256(shown(rivals).encode()).hexdigest()}
    with matplotlib.rc_context({"svg.hashsalt": "pareto", "font.size": 11}):
        pareto(rivals).savefig(path, metadata=told)
