"""Every diffusion transformer of diffusers, compiled and compared with eager: python -m benchmarks.models [CLASS ...].

Tiny random-weight models (tests/zoo), two processes side by side, some 20 minutes for all. Writes results/models.json
(classes that were not asked for keep their rows) and docs/models.md, and says which failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from edit_compile.measuring.machine import describe_machine, summary
from passes.graphs.graph import MlpSite, Report
from passes.lowering.onnx_format import LowerError
from passes.program.compilation import Compilation, Group
from runtime.base.errors import EngineError
from runtime.bundle.spec import Manifest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "models.json"
DOCUMENT = ROOT / "docs" / "models.md"
GATE, WIDTH = 0.5, 0.6
_BLOCK_PASSES = ("discover", "states", "export", "real", "guards")
console = Console()


@dataclass(frozen=True)
class Row:
    """What became of one class; `error` is None where it compiled and agreed with eager.

    `torch_only` says why onnxruntime does not run it, None where it does.
    """

    name: str
    error: str | None = None
    lists: Mapping[str, int] | None = None
    states: tuple[str, ...] = ()
    mlps: tuple[str, ...] = ()
    plans: int = 0
    standalone: bool = False
    flops_left: float = 1.0
    seconds: float = 0.0
    refused: tuple[tuple[str, str], ...] = ()
    torch_only: str | None = None


def compile_class(name: str) -> Row:
    """Compile one class for both engines and compare it (tests.catalogue.check); what went wrong is in the row."""
    from tests.catalogue import check

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch_only: str | None = None
    try:
        try:
            checked = check(name)
        except (EngineError, LowerError) as error:
            torch_only = _told(error)
            checked = check(name, ("torch",))
    except Exception as error:
        return Row(name, f"{type(error).__name__}: {_told(error)}")
    analysis, manifest = checked.analysis, checked.manifest
    return Row(
        name,
        lists=dict(Counter(site.name.rpartition(".")[0] for site in analysis.discovery.blocks)),
        states=tuple(dict.fromkeys(", ".join(_streams(group)) for group in analysis.groups)),
        mlps=tuple(dict.fromkeys(", ".join(map(kind_of, group.sites)) or "none" for group in analysis.groups)),
        plans=len(manifest.plans),
        standalone=all(glue.file is not None for glue in manifest.glues),
        flops_left=flops_left(manifest),
        seconds=checked.seconds,
        refused=tuple(_refusals(checked.reports, analysis)),
        torch_only=torch_only,
    )


def _told(error: Exception) -> str:
    plain = re.sub(r"\x1b\[\d*m", "", str(error))
    return " ".join(plain.split())[:200]


def kind_of(site: MlpSite) -> str:
    """An MLP in words: how its hidden channels are made and read, and how many there are."""
    producers = [slot for slot in site.slots if slot.dim == 0 and not site.weight_names[slot.weight].endswith("bias")]
    fused = any(slot.start for slot in site.contractions)
    words = (["fused"] if fused else []) + (["GLU"] if len(producers) > 1 else ["MLP"])
    return " ".join([*words, str(site.hidden)])


def flops_left(manifest: Manifest) -> float:
    """Expected share of the dense FLOPs at FLUX's budget: half of the blocks, at a mean width of .6."""
    glue = manifest.glues[0]
    kept = dense = float(glue.flops)
    for block in manifest.blocks:
        costs = sorted((cost.variant, cost.flops) for cost in glue.costs if cost.plan == block.plan)
        plan = next(plan for plan in manifest.plans if plan.id == block.plan)
        widths = [plan.variants[variant].width for variant, _ in costs]
        kept += GATE * float(np.interp(WIDTH, widths, [flops for _, flops in costs]))
        dense += costs[-1][1]
    return kept / dense


def _streams(group: Group) -> list[str]:
    return [group.graph.inputs[index] for index in group.graph.states]


def _refusals(reports: Iterable[Report], analysis: Compilation) -> Iterable[tuple[str, str]]:
    """Everything that might have been a block, or standalone, and is not; linears that are no MLP are left out."""
    found = {site.name for site in analysis.discovery.blocks}
    for report in reports:
        if report.name in _BLOCK_PASSES:
            yield from ((r.where, r.reason.splitlines()[0]) for r in report.refused if r.where not in found)


def render(
    rows: list[Row], machine: Mapping[str, str], left_out: Mapping[str, str], missing: Sequence[str] = ()
) -> str:
    """docs/models.md."""
    done = [row for row in rows if row.error is None]
    seconds = median([row.seconds for row in done] or [0.0])
    alone = sum(row.standalone for row in done)
    lines = [
        "# Models",
        "",
        "Every transformer class of `diffusers.models.transformers` "
        f"{machine['diffusers']}, as a tiny model with random weights, compiled for onnxruntime and torch and compared "
        "with eager: all gates open, every width against the masked model, a sequence of skips, reuses and widths "
        "against an oracle; the elastic model's routers get gradients. Made by `make models`.",
        "",
        f"**{len(done)} of {len(rows)} compile, {alone} of them standalone** (the bundle needs no model code; in "
        f"the others the model's own forward hosts the guards){_torch_only(done)}. Compiling for both engines took a "
        f"median of {seconds:.0f} s of CPU time ({summary(machine)}, one core per model).",
        "",
        "MLPs: hidden channels in each kind of block; a GLU is made by two maps, a fused MLP is read together with "
        "other channels. FLOPs left: at FLUX's budget, half of the blocks at a mean width of 0.6; tiny models have "
        "much glue.",
        "",
        "| class | blocks | states | MLPs | plans | bundle | FLOPs left |",
        "|---|---|---|---|---|---|---|",
        *map(_line, rows),
        *(f"| {name} | not run yet | | | | | |" for name in missing),
        "",
        "## Left as they are",
        "",
        "What looked like a block and is not guarded, or why the glue is hosted:",
        "",
        *(line for row in rows for line in _reasons(row)),
        "",
        "## Not diffusion transformers",
        "",
        *(f"- `{name}`: {reason}" for name, reason in sorted(left_out.items())),
    ]
    return "\n".join(lines) + "\n"


def _torch_only(done: Sequence[Row]) -> str:
    apart = sum(row.torch_only is not None for row in done)
    return f"; {apart} on the torch engine only" if apart else ""


def _line(row: Row) -> str:
    if row.error is not None:
        return f"| {row.name} | - | - | - | - | fails | - |"
    blocks = ", ".join(f"{name or 'blocks'} x {count}" for name, count in (row.lists or {}).items())
    cells = (row.name, blocks, "; ".join(row.states), "; ".join(row.mlps), row.plans)
    return (
        "| "
        + " | ".join(map(str, cells))
        + f" | {'standalone' if row.standalone else 'hosted'}{', torch only' if row.torch_only else ''}"
        + f" | {row.flops_left:.0%} |"
    )


def _reasons(row: Row) -> Iterable[str]:
    if row.error is not None:
        yield f"- **{row.name}** fails: {row.error}"
    if row.torch_only is not None:
        yield f"- {row.name} does not run on onnxruntime: {row.torch_only}"
    for reason, places in _grouped(row.refused).items():
        yield f"- {row.name}: {', '.join(f'`{place}`' for place in places)}: {reason}"


def _grouped(refused: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for where, reason in refused:
        groups.setdefault(reason, []).append(where)
    return groups


def main() -> None:
    from tests.zoo import CASES, LEFT_OUT

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", metavar="CLASS")
    asked = parser.parse_args().classes or sorted(CASES)
    unknown = [name for name in asked if name not in CASES]
    if unknown:
        parser.error(f"the zoo has no {unknown[0]}")
    held = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {row["name"]: Row(**row) for row in held if row["name"] in CASES and row["name"] not in asked}
    os.environ["OMP_NUM_THREADS"] = "1"
    machine = describe_machine()
    with Progress() as progress, get_context("spawn").Pool(2, maxtasksperchild=8) as pool:
        task = progress.add_task("compiling", total=len(asked))
        for row in pool.imap_unordered(compile_class, asked):
            rows[row.name] = row
            write(rows, machine, LEFT_OUT, sorted(set(CASES) - set(rows)))
            progress.console.print(f"{row.name}: {row.error or f'{row.plans} plans, {row.seconds:.0f} s'}")
            progress.advance(task)
    failed = [row for row in rows.values() if row.error is not None]
    console.print(f"{len(rows) - len(failed)} of {len(rows)} compile; wrote {DOCUMENT.relative_to(ROOT)}")
    sys.exit(1 if failed else 0)


def write(
    rows: Mapping[str, Row], machine: Mapping[str, str], left_out: Mapping[str, str], missing: Sequence[str]
) -> None:
    """Both files, from the rows so far; `missing` classes have none yet."""
    ordered = [rows[name] for name in sorted(rows)]
    RESULTS.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in ordered]}, indent=1) + "\n")
    DOCUMENT.write_text(render(ordered, machine, left_out, missing))


if __name__ == "__main__":
    main()
