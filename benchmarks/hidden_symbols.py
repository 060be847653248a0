"""Whether torch.export's symbols could find today's MLPs: python -m benchmarks.hidden_symbols [CLASS ...]

Proof of a decision (docs/architecture.md, "Why MLPs are found by their channels"). The other way
(benchmarks.symbol_search): a block's weights become inputs whose hidden dimension is a symbol; sizes that follow one
symbol in the export are one MLP. For every kind of block: which MLPs of passes/mlp are found so, whether one graph with
narrowed weights gives what the masked block gives, and seconds of the processor both ways. "All at once" is the export
of all MLPs that were found, the one graph for every width.

CLASS is one of tests/zoo (all by default), or a script, whose models are those that it gives to `edit_compile.compile`.
Writes results/hidden_symbols.json after each; what is not asked for keeps its rows.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch import nn

from benchmarks.symbol_search import NotFoundError, candidates, shape_of, together, try_candidate
from edit_compile.measuring.machine import describe_machine
from passes.graphs.graph import BlockGraph, MlpSite
from passes.graphs.numbers import largest
from passes.mlp.sites import find_sites
from passes.mlp.weights import at_widths
from passes.pipeline import run_passes
from passes.program.compilation import Compilation, Group

RESULTS = Path(__file__).parent / "results" / "hidden_symbols.json"
WIDTHS = (0.25, 0.5, 0.75, 1.0)
Row = dict[str, Any]


def try_kind(group: Group) -> Row:
    """One kind of block, both ways."""
    clock = [time.process_time()]
    sites, _ = find_sites(group.graph)
    clock.append(time.process_time())
    at_widths(group.graph, sites, WIDTHS)
    clock.append(time.process_time())
    tried: list[Row] = []
    found: list[tuple[MlpSite, str]] = []
    seen: set[str] = set()
    for end, marks in candidates(group.graph):
        if end not in seen:
            site, row = try_candidate(group, end, marks)
            tried.append(row)
            if site is not None:
                found.append((site, row["way"]))
                seen |= {slot.weight for slot in site.contractions}
    clock.append(time.process_time())
    own = [set(site.slots) for site in sites]
    shared = [(site, way) for site, way in found if set(site.slots) in own]
    ways = {way for _, way in shared}
    joint = together(group, [site for site, _ in shared], max(ways)) if shared else None
    clock.append(time.process_time())
    rows = {row["end"]: row for row in tried}
    told = [_compared(group.graph, site, rows, [set(one.slots) for one, _ in shared]) for site in sites]
    ends = {end for site in told for end in site["ends"]}
    spans = pairwise(clock)
    return {
        "block": group.first.name,
        "sites": told,
        "others": [row for row in tried if row["end"] not in ends],
        "all at once": joint,
        "exports": sum(row["exports"] for row in tried),
        "seconds": dict(zip(("walk", "four widths", "search", "all at once"), (b - a for a, b in spans), strict=True)),
    }


def _compared(graph: BlockGraph, site: MlpSite, rows: Mapping[str, Row], found: Sequence[set[Any]]) -> Row:
    """One of today's MLPs, and what the search for symbols saw of it."""
    ends = list(dict.fromkeys(site.weight_names[slot.weight] for slot in site.contractions))
    row = next((rows[end] for end in ends if end in rows), {"reasons": {"code": "no candidate"}})
    return {**row, "ends": ends, "kind": kind_of(graph, site), "found": set(site.slots) in found}


def kind_of(graph: BlockGraph, site: MlpSite) -> str:
    """An MLP in words: how its hidden channels are made and read."""
    made = [slot for slot in site.slots if not slot.dim and len(shape_of(graph, slot.weight)) > 1]
    filters = {slot.weight for slot in made if shape_of(graph, slot.weight)[1] == 1}
    rows = {slot.weight: sum(one.size for one in made if one.weight == slot.weight) for slot in made}
    maps = [slot for slot in made if slot.weight not in filters]
    words = ["packed" if len({slot.weight for slot in maps}) < len(maps) else ""]
    words += ["GLU" if len(maps) > 1 else "MLP", "with depthwise convolution" if filters else ""]
    words += ["of a map that makes more" if any(shape_of(graph, one)[0] != size for one, size in rows.items()) else ""]
    joined = any(shape_of(graph, slot.weight)[1] != slot.size for slot in site.contractions)
    return " ".join(filter(None, [*words, "read with others" if joined else ""]))


def models(asked: str) -> Iterator[tuple[str, nn.Module, Any, str | None]]:
    """Name, model, inputs and timestep of a class of the zoo, or of each model that a script compiles."""
    if not asked.endswith(".py"):
        from tests.zoo import CASES

        case = CASES[asked]()
        yield asked, case.model, case.inputs, case.timestep
        return
    given: list[tuple[nn.Module, Any]] = []

    def note(model: nn.Module, inputs: Any, **_: Any) -> None:
        given.append((model, inputs))
        raise NotFoundError("noted")

    sys.path.insert(0, str(Path(asked).parent))
    with (
        patch("edit_compile.compile", note),
        patch("edit_compile.elasticize", note),
        redirect_stdout(None),
        suppress(Exception, SystemExit),
    ):
        runpy.run_path(asked, run_name="__main__")
    for number, (model, inputs) in enumerate(given, 1):
        yield f"{Path(asked).stem} {number}", model.eval(), inputs, None


def try_models(asked: str) -> list[Row]:
    """A row for every model that `asked` stands for."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name, model, inputs, timestep in models(asked):
        row: Row = {"name": name, "kinds": [], "left": []}
        try:
            made = run_passes(Compilation(model, inputs, timestep), until="mlp")
            left = (one for report in made.reports if report.name != "mlp" for one in report.refused)
            row["left"] = sorted({f"{one.where}: {one.reason.splitlines()[0]}"[:200] for one in left})
            row["kinds"] = [try_kind(group) for group in made.groups]
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:200]
        rows.append(row)
    return rows


def totals(rows: Sequence[Row]) -> Row:
    """What docs/architecture.md says of all models."""
    kinds = [kind for row in rows for kind in row["kinds"] if kind["sites"]]
    sites = [{**site, "name": row["name"]} for row in rows for kind in row["kinds"] for site in kind["sites"]]
    others = [other for row in rows for kind in row["kinds"] for other in kind["others"]]
    joint = [kind["all at once"] for kind in kinds if kind["all at once"]]
    return {
        "models": len(rows),
        "models without blocks": sorted(row["name"] for row in rows if not row["kinds"]),
        "kinds of blocks with MLPs": len(kinds),
        "of these with all MLPs found": sum(all(site["found"] for site in kind["sites"]) for kind in kinds),
        "MLPs": _counted(sites),
        "MLPs by kind": {
            kind: _counted([site for site in sites if site["kind"] == kind])
            for kind in sorted({site["kind"] for site in sites})
        },
        "one graph for every width": {"kinds": len(joint), "equal": sum(one["equal"] for one in joint)},
        "other candidates": {"tried": len(others), "equal": sum(other.get("equal", False) for other in others)},
        "exports of a kind of block": median([kind["exports"] for kind in kinds] or [0]),
        "seconds of a kind of block": {
            what: median([kind["seconds"][what] for kind in kinds] or [0.0])
            for what in ("walk", "four widths", "search", "all at once")
        },
    }


def _counted(sites: Sequence[Row]) -> Row:
    """How many MLPs there are, how many are found, and why others are not."""
    proposed = [site for site in sites if "difference" in site]
    missed = [site for site in sites if not site["found"]]
    reasons = (f"{site['name']}: {next(iter(site['reasons'].values()), 'another MLP')}" for site in missed)
    return {
        "today": len(sites),
        "by symbols": len(proposed),
        "equal and the same": len(sites) - len(missed),
        "ways": dict(Counter(site["way"] for site in sites if site["found"])),
        "largest difference": largest(site["difference"] for site in proposed) if proposed else None,
        "missed": sorted(set(reasons)),
    }


def main() -> None:
    """Try all that is asked for, two processes side by side."""
    from tests.zoo import CASES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", metavar="CLASS")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    held = json.loads(given.output.read_text())["rows"] if given.output.exists() else []
    rows = {row["name"]: row for row in held}
    os.environ["OMP_NUM_THREADS"] = "1"
    console, machine = Console(), describe_machine()
    with get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        for made in pool.imap_unordered(try_models, given.classes or sorted(CASES)):
            rows |= {row["name"]: row for row in made}
            ordered = [rows[name] for name in sorted(rows)]
            told = {"machine": machine, "totals": totals(ordered), "rows": ordered}
            given.output.write_text(json.dumps(told, indent=1) + "\n")
            for row in made:
                sites = [site for kind in row["kinds"] for site in kind["sites"]]
                found = sum(site["found"] for site in sites)
                console.print(f"{row['name']}: {found} of {len(sites)} {row.get('error', '')}")
    console.print_json(data=told["totals"])


if __name__ == "__main__":
    main()
