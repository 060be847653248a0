"""`edit-compile tune`: a bundle's tiers, found on recorded calls and written into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edit_compile.bundles.tier_table import tier_table
from edit_compile.calls.generations import Recording
from edit_compile.loading import UserError
from edit_compile.tuning.tune import Tuned, tune
from runtime.face.load import load


def tune_bundle(
    bundle: Path,
    calls: Path,
    budgets: Sequence[str],
    qualities: Sequence[str],
    engine: str | None,
    output: Path,
    console: Console,
) -> None:
    """Find the tiers, print them on `console`, and write the bundle with them to `output`.

    Raises UserError for a budget or quality that is not "name=number", and as `tune`.
    """
    budget, quality = (parse_named(given) for given in (budgets, qualities))
    compiled = load(bundle, engine=engine)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as shown:
        task = shown.add_task("recorded calls")
        tuned = tune(
            compiled,
            list(Recording(calls)),
            budget=budget,
            quality=quality,
            progress=lambda what, done, total: shown.update(task, description=what, completed=done, total=total),
        )
    tuned.add_to(compiled)
    console.print(tier_table(tuned.tiers))
    console.print(against_fewer_steps(tuned))
    compiled.save(output)
    console.print(f"wrote {output}")


def against_fewer_steps(tuned: Tuned) -> Table:
    """Each tier beside sampling with as many steps as it computes."""
    table = Table(title="beside fewer sampling steps, on the held-out generations")
    for heading in ("tier", "computed steps", "dB", "dB of as many sampling steps", "better"):
        table.add_column(heading)
    for name, tier in tuned.tiers.items():
        fewer, own = tuned.fewer_steps[name], tier.quality_db or 0.0
        better = "the tier" if own > fewer else "fewer steps"
        table.add_row(name, str(tuned.computed_steps[name]), f"{own:.1f}", f"{fewer:.1f}", better)
    return table


def parse_named(given: Sequence[str]) -> dict[str, float]:
    """ "fast=.36" and the like as numbers by name; UserError for what is none."""
    found: dict[str, float] = {}
    for one in given:
        name, _, number = one.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise UserError(f"{one!r}: say name=number, for example fast=.36") from None
        if not name:
            raise UserError(f"{one!r} has no name: say name=number, for example fast=.36")
    return found
