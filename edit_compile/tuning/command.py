"""`edit-compile tune`: a bundle's tiers, found on recorded calls and written into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edit_compile.calls.generations import Recording
from edit_compile.loading import UserError
from edit_compile.tuning.table import tables
from edit_compile.tuning.tune import tune
from runtime.bundle.files import check_place, replaced
from runtime.face.load import load


@dataclass(frozen=True)
class Asked:
    """What `edit-compile tune` is given, as text where it is."""

    bundle: Path
    calls: Path
    output: Path
    budgets: Sequence[str] = ()
    qualities: Sequence[str] = ()
    engine: str | None = None
    work: Path | None = None
    picture: Path | None = None


def tune_bundle(asked: Asked, console: Console) -> None:
    """Find the tiers, print them on `console`, and write the bundle with them.

    Raises UserError for a budget or quality that is not "name=number", and as `tune`.
    """
    budget, quality = (parse_named(given) for given in (asked.budgets, asked.qualities))
    check_place(asked.output)
    compiled = load(asked.bundle, engine=asked.engine)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as shown:
        task = shown.add_task("recorded calls")
        tuned = tune(
            compiled,
            Recording(asked.calls),
            budget=budget,
            quality=quality,
            work=asked.work,
            progress=lambda what, done, total: shown.update(task, description=what, completed=done, total=total),
        )
    for name in sorted(tuned.tiers.keys() & compiled.tiers.keys()):
        console.print(f"replaces the tier {name!r} that {asked.bundle} has")
    tuned.add_to(compiled)
    console.print(tables(tuned))
    if told := replaced(asked.output):
        console.print(told)
    compiled.save(asked.output)
    console.print(f"wrote {asked.output}")
    if asked.picture is not None:
        console.print(f"wrote {tuned.plot(asked.picture)}")


def parse_named(given: Sequence[str]) -> dict[str, float]:
    """ "fast=.36" and the like as numbers by name; UserError for what is none."""
    found: dict[str, float] = {}
    for one in given:
        name, _, number = one.partition("=")
        name = name.strip()
        if name in found:
            raise UserError(f"{one!r}: {name!r} is given twice, a tier has one")
        try:
            found[name] = float(number)
        except ValueError:
            raise UserError(f"{one!r}: say name=number, for example fast=.36") from None
        if not name:
            raise UserError(f"{one!r} has no name: say name=number, for example fast=.36")
    return found
