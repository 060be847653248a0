"""Pictures: what the routers decided (the paper's figure 7), and latencies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import numpy.typing as npt
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from edit_compile.measuring.timing import Spread
from runtime.requests.trace import COMPUTED, REUSED, SKIPPED, RequestTrace
from runtime.routing.policy import REUSE, SKIP

Grid = npt.NDArray[np.generic]

_SKIPPED, _REUSED = "#ffffff", "#f0b35a"
_WIDTHS = LinearSegmentedColormap.from_list("widths", ("#c3daf3", "#93bbe8", "#4d8bd0", "#1d4f91", "#0b2447"))
"""From no width to all of it, so that a width has one colour in every picture; none is near that of what is skipped."""


def router_heat_map(trace: RequestTrace, context: str | None = None) -> Figure:
    """Gate and decision of every block at every step of one request.

    Left: the gate p, mean over the rows of the batch. Right: the first row's decision - skipped, reused, or computed at
    a width.

    Raises:
        ValueError: the trace is empty.
    """
    grid = trace.grid(context)
    if not grid["p"].size:
        raise ValueError("the trace is empty: run the compiled transformer first")
    figure = Figure(figsize=(11, 0.5 + 0.16 * max(grid["p"].shape[1], 14)), layout="constrained")
    gates, decisions = figure.subplots(1, 2, sharey=True)
    _draw_gates(figure, gates, grid["p"])
    _draw_decisions(figure, decisions, grid["done"], grid["width"])
    gates.set_ylabel("block")
    for axes in (gates, decisions):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # in a generation of few steps they would be halves
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def read_trace(text: str) -> RequestTrace:
    """The newest request of what `Trace.to_json` wrote; ValueError where it is something else."""
    try:
        (*_, last) = json.loads(text)
        record = RequestTrace(last["request"])
        for name in last["contexts"]:
            record.context(name)
        columns = (last[name] for name in ("context", "step", "block", "p", "width", "done"))
        for (context, step, block), rows in groupby(zip(*columns, strict=True), key=itemgetter(0, 1, 2)):
            _, _, _, gates, widths, done = zip(*rows, strict=True)
            record.add(context, step, block, gates, [_decision(*row) for row in zip(widths, done, strict=True)])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"this is not a trace as compiled.trace.to_json() writes it ({error})") from error
    return record


def _decision(width: float, done: int) -> float:
    return width if done == COMPUTED else REUSE if done == REUSED else SKIP


def decision_levels(done: Grid, width: Grid, widths: Sequence[float]) -> npt.NDArray[np.float64]:
    """Per (step, block): NaN not called, 0 skipped, 1 reused, 2 + i computed at `widths[i]`."""
    levels = np.full(done.shape, np.nan)
    levels[done == SKIPPED] = 0
    levels[done == REUSED] = 1
    for index, value in enumerate(widths):
        levels[np.isclose(width, value) & (done == COMPUTED)] = 2 + index
    return levels


def latency_bars(latencies: Mapping[str, Spread], limit: float | None = None) -> Figure:
    """Median milliseconds per step with their middle halves; `limit` is drawn as a line."""
    figure = Figure(figsize=(6, 0.8 + 0.5 * len(latencies)), layout="constrained")
    axes = figure.subplots()
    names = list(latencies)
    medians = np.array([latencies[name].median for name in names])
    low = medians - [latencies[name].low for name in names]
    high = [latencies[name].high for name in names] - medians
    axes.barh(names, medians, xerr=[low, high], color="#4d8bd0", ecolor="#333", capsize=3)
    for row, (median, upper) in enumerate(zip(medians, high, strict=True)):  # beside the bar: short ones hold no number
        axes.annotate(f"{median:.4g}", (median + upper, row), xytext=(6, 0), textcoords="offset points", va="center")
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    if limit is not None:
        axes.axvline(limit, color="#c0392b", linestyle="--", label="what the FLOPs left allow")
        axes.legend(loc="lower right", fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("ms per step (median, middle half)")
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write `figure` as the image `path`, whose suffix names the format; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _draw_gates(figure: Figure, axes: matplotlib.axes.Axes, p: Grid) -> None:
    mean = np.nanmean(p.astype(float), axis=-1).T
    image = axes.imshow(mean, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set_title("gate p")
    figure.colorbar(image, ax=axes, shrink=0.9)


def _draw_decisions(figure: Figure, axes: matplotlib.axes.Axes, done: Grid, width: Grid) -> None:
    computed = width[done == COMPUTED]
    widths = sorted({round(float(value), 4) for value in computed})
    palette = [_SKIPPED, _REUSED, *(to_hex(_WIDTHS(width)) for width in widths)]
    edges = BoundaryNorm(np.arange(len(palette) + 1) - 0.5, len(palette))
    levels = decision_levels(done[..., 0], width[..., 0], widths).T
    image = axes.imshow(
        levels, aspect="auto", origin="lower", cmap=ListedColormap(palette), norm=edges, interpolation="nearest"
    )
    axes.set_xticks(np.arange(levels.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(levels.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#c4c4cc", linewidth=0.5)  # what is skipped is white: its cells have edges
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, ticks=range(len(palette)))
    bar.set_ticklabels(["skipped", "reused", *(f"width {value:g}" for value in widths)])
    axes.set_title("what was done (first row)")
