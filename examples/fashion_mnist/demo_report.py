"""The demo's results as a table for the terminal and as one self-contained page."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table

from edit_compile.measuring.machine import summary

TEMPLATE = Path(__file__).parent / "report.html.j2"
TIER_HEADINGS = ("", "times faster", "PSNR to the dense images, dB")
HEADINGS = ("", "ms per step", "times faster", "FLOPs left", "accuracy", "Frechet distance")


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table as text; the last one is what real images reach."""
    rows = [
        (
            row["name"],
            f"{row['ms']['median']:.1f}",
            f"{row['ratio']['median']:.2f} ({row['ratio']['low']:.2f} to {row['ratio']['high']:.2f})",
            f"{row['flops_left']:.0%}",
            f"{row['accuracy']:.1%}",
            f"{row['distance']:.2f}",
        )
        for row in results["rows"]
    ]
    real = results["real"]
    floor = "" if real["distance"] is None else f"{real['distance']:.2f}"
    return [*rows, ("real images", "", "", "", f"{real['accuracy']:.1%}", floor)]


def table_of(results: dict[str, Any]) -> Table:
    """The results for the terminal."""
    table = Table(*HEADINGS, title=f"Fashion-MNIST, {caption(results)}", caption=summary(results["machine"]))
    for row in cells(results):
        table.add_row(*row)
    return table


def tier_cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Tiers, and under each what takes its time, as text."""
    rows = []
    for row in results["tiers"]:
        rival = row["beside"] and not row["name"].startswith("tier")
        near = "-" if row["decibels"] is None else f"{row['decibels']:.1f}"
        rows.append((f"{'beside it: ' if rival else ''}{row['name']}", f"{row['ratio']['median']:.2f}", near))
    return rows


def tier_table(results: dict[str, Any]) -> Table:
    """For the terminal."""
    table = Table(
        *TIER_HEADINGS,
        title="the dense model in 28 steps, by tier; beside it: what took no longer when it was recorded",
        caption=results["waits"],
    )
    for row in tier_cells(results):
        table.add_row(*row)
    return table


def caption(results: dict[str, Any]) -> str:
    """How the figures were taken, in one line."""
    return (
        f"{results['images']} images per row, {results['steps']} steps, both guidance branches; "
        f"a step is timed with ten images on one thread, engine {results['engine']}"
    )


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Write report.html into `folder`, with the pictures found there inside it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text()).render(
        caption=caption(results),
        machine=results["machine"],
        headings=HEADINGS,
        rows=cells(results),
        waits=results["waits"],
        tier_headings=TIER_HEADINGS,
        tier_rows=tier_cells(results),
        tier_grids=[
            (name, f"{ratio} times faster", embedded(folder / row["grid"]))
            for row, (name, ratio, _) in zip(results["tiers"], tier_cells(results), strict=True)
        ],
        difference=f"{results['largest_difference']:.1g}",
        grids=[(row["name"], embedded(folder / row["grid"])) for row in results["rows"]],
        latency=embedded(folder / "latency.png"),
        router=embedded(folder / "router.png"),
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def embedded(image: Path) -> str:
    """A PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
