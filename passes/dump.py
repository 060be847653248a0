"""The state of a compilation as text, a file per pass: ``00-start.txt``, ``01-discover.txt``, ...

Beside the file of a pass that changed a graph lies a unified diff of the graphs, ``05-real.diff``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import fx

from passes.mlp.written_states import state_names
from passes.program.compilation import Compilation, Group
from runtime.base.errors import EditError


class DumpError(EditError):
    """The folder of a dump cannot be written to; the message says why."""


@contextmanager
def dumping(folder: Path) -> Iterator[None]:
    """Inside the ``with`` block, where something is written to `folder`, an OSError is a DumpError."""
    try:
        yield
    except OSError as error:
        raise DumpError(
            f"dump={str(folder)!r} (or EDIT_COMPILE_DUMP) cannot be written to ({error.strerror}): give another folder"
        ) from error


def start(folder: Path, compilation: Compilation) -> None:
    """Make the folder, remove what an earlier run wrote there, and write the model and how it is to be compiled."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if re.fullmatch(r"\d\d-.+\.(txt|diff)", path.name) and _is_ours(path):
            path.unlink()
    given = f"timestep {compilation.timestep}, narrow {compilation.narrow}, widths {compilation.widths}"
    (folder / "00-start.txt").write_text(f"{given}\n\n{compilation.model}\n")


def write_pass(folder: Path, number: int, name: str, compilation: Compilation, before: Mapping[str, str]) -> None:
    """The state after pass `number`, called `name`, and what it changed of the graphs `before` it."""
    now = graph_texts(compilation)
    (folder / f"{number:02d}-{name}.txt").write_text("\n".join(_state(name, compilation, now)) + "\n")
    changes = [
        line
        for key in now.keys() & before.keys()
        for line in difflib.unified_diff(
            before[key].splitlines(), now[key].splitlines(), f"{key} before {name}", f"{key} after {name}", lineterm=""
        )
    ]
    if changes:
        (folder / f"{number:02d}-{name}.diff").write_text("\n".join(changes) + "\n")


def _is_ours(path: Path) -> bool:
    """Whether it begins as the file of a pass, or its diff, does."""
    name = path.stem.partition("-")[2]
    with path.open(errors="replace") as file:
        first = file.readline()
    return first.startswith((f"after {name}: ", "timestep ")) or (
        first.startswith("--- ") and first.endswith(f" before {name}\n")
    )


def graph_texts(compilation: Compilation) -> dict[str, str]:
    """The code of every graph, by what `modules` calls it."""
    return {key: module.print_readable(print_output=False) for key, module in modules(compilation).items()}


def modules(compilation: Compilation) -> dict[str, fx.GraphModule]:
    """Every graph: of a group by its first block's name, of its plan with the width, and of each glue."""
    found: dict[str, fx.GraphModule] = {}
    for group in compilation.groups:
        if group.exported is not None:
            found[group.first.name] = group.exported.module
        if group.widened is not None:
            widths = zip(group.widened.widths, group.widened.variants, strict=True)
            found |= {f"{group.first.name} at width {width:g}": variant for width, variant in widths}
    for glue in compilation.glues:
        if glue.graph is not None:
            found[f"glue {glue.entry.id}"] = glue.graph.module
    return found


def _state(name: str, compilation: Compilation, graphs: Mapping[str, str]) -> Iterator[str]:
    yield f"after {name}: {compilation.seconds[name]:.3f} s"
    yield f"\n{len(compilation.blocks)} blocks"
    for number, site in enumerate(compilation.blocks):
        yield f"  {number} {site.name}: {type(site.module).__name__}"
    yield f"\n{len(compilation.groups)} groups"
    for group in compilation.groups:
        yield f"  {', '.join(site.name for site in group.blocks)}{_found(group)}"
    for item in compilation.planned:
        yield f"  plan {item.plan.id}: {item.group.first.name}"
    refused = [(report.name, refusal) for report in compilation.reports for refusal in report.refused]
    yield f"\n{len(refused)} left alone"
    yield from (f"  {by}: {refusal.where}: {refusal.reason}" for by, refusal in refused)
    for key, text in graphs.items():
        yield f"\n# {key}\n{text}"


def _found(group: Group) -> str:
    """What is known of the group, as the end of a line."""
    pairs = "" if group.paired is None else f"; output continues input: {dict(group.paired.pairs)}"
    states = "" if group.exported is None else f"; states {', '.join(state_names(group.exported))}"
    return f"{pairs}{states}; {len(group.sites)} MLP sites"
