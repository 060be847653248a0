"""All figures of docs/evidence.md, made again: python -m examples.fashion_mnist.evidence (`make evidence`).

Tunes, tries the rivals, draws 1,000 images for each row, times them, looks at the paper's claims, trains what these
need, and writes the pages from what was found. Goes on where it stopped. With --quick (`make evidence-quick`) it draws
the headline rows alone, and exits with 1 where one of them lies outside of the interval that
benchmarks/results/rivals.json has for it; their times are told beside what was recorded, and decide nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import edit_compile
from edit_compile.measuring.machine import describe_machine, summary
from examples.fashion_mnist.contestant import Contestant
from examples.fashion_mnist.contestants_compiled import of
from examples.fashion_mnist.contestants_hooks import taylor_seer
from examples.fashion_mnist.data import CLASSES, NO_CLASS
from examples.fashion_mnist.demo_tiers import tiers
from examples.fashion_mnist.finals import Final, Result
from examples.fashion_mnist.model import CHANNELS, TOKENS, inputs, load_model
from examples.fashion_mnist.rivals import RESULTS, times_faster
from examples.fashion_mnist.rivals_trials import Work
from examples.fashion_mnist.sample import FEW_STEPS

TAKES = "about two hours of one core; what is done so far is kept in {}, and the same command goes on"
TAKES_QUICK = "about ten minutes of one core"
TIERS = ("half", "quarter")
ROUNDING = 1e-3
"""Relative, of what is deterministic up to the order in which floats are added."""


def headlines() -> Iterator[Contestant]:
    """The rows that are looked at again, but for the dense one: tiers by their recorded decisions, nothing is tuned."""
    x, t = torch.randn(2, TOKENS, CHANNELS), torch.tensor([0.3, 0.7])
    example = inputs(x, t, torch.tensor([len(CLASSES) - 1, NO_CLASS]))
    dense, elastic = (
        edit_compile.compile(load_model(name), inputs=example, engine="torch") for name in ("dense", "elastic")
    )
    yield from (one for one in tiers(dense) if one.settings in TIERS)
    for steps in (10, 7):
        yield of("fewer steps, compiled", f"{steps} steps", dense, steps)
    yield of("elastic, distilled", f"{FEW_STEPS} steps", elastic, FEW_STEPS)
    yield next(one for one in taylor_seer("dense") if one.settings == "every 3, order 1, from step 1")


def outside(found: Result, known: Mapping[str, Any]) -> list[str]:
    """In words, what of a row lies outside of the recorded intervals."""
    told = []
    for name in ("decibels", "distance", "accuracy"):
        low, high = known[f"{name}_interval"]
        slack = ROUNDING * max(abs(low), abs(high))
        value = getattr(found, name)
        if not low - slack <= value <= high + slack:
            told.append(f"{name} {value:.4g} is outside of {low:.4g} to {high:.4g}")
    if abs(found.flops_share - known["flops_share"]) > ROUNDING:
        told.append(f"FLOPs are {found.flops_share:.1%} of the dense model's, were {known['flops_share']:.1%}")
    return told


def check(results: Path, console: Console) -> bool:
    """Whether all headline rows lie where they were recorded."""
    recorded = json.loads((results / "rivals.json").read_text())
    known = {f"{one['who']}: {one['settings']}": one for one in recorded["results"]}
    final = Final("dense", recorded["images"], recorded["rows"])
    work, labels = Work.counted(final.labels[0]), torch.cat(list(final.labels))
    base = Contestant("dense", "28 steps", lambda: final.draw_dense)
    found = {base.name: final.figures(base, final.target, labels, 1.0)}
    contestants = list(headlines())
    for one in contestants:
        console.print(f"drawing {recorded['images']} images: {one.name}")
        draw = one.prepare()
        images, _ = final.drawn(draw)
        found[one.name] = final.figures(one, images, labels, work.share(one, draw, final.labels[0]))
    draws = {"dense": final.draw_dense} | {one.name: one.prepare() for one in contestants}
    faster = times_faster(draws, final.labels[0], 3)
    table = Table("row", "dB", "distance", "accuracy", "times faster", "was", "", title="against benchmarks/results")
    fine = True
    for name, one in found.items():
        wrong = outside(one, known[name])
        fine &= not wrong
        numbers = f"{one.decibels:.1f}", f"{one.distance:.1f}", f"{one.accuracy:.1%}"
        times = f"{faster.get(name, 1.0):.2f}", f"{known[name]['times_faster']:.2f}"
        table.add_row(name, *numbers, *times, "; ".join(wrong) or "as recorded")
    table.caption = f"{summary(describe_machine())}; times decide nothing"
    console.print(table)
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"check the headline rows alone: {TAKES_QUICK}")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="what is done so far")
    given = parser.parse_args()
    console, began = Console(width=160), time.monotonic()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*has no routers")
    if given.quick:
        console.print(f"This takes {TAKES_QUICK}.")
        fine = check(RESULTS, console)
        console.print(
            f"{'all as recorded' if fine else 'NOT as recorded'}; {(time.monotonic() - began) / 60:.0f} minutes"
        )
        sys.exit(0 if fine else 1)
    console.print(f"This takes {TAKES.format(given.work)}.")
    run = partial(subprocess.run, check=True)
    for module in ("examples.fashion_mnist.rivals", "examples.fashion_mnist.paper", "examples.fashion_mnist.starts"):
        run([sys.executable, "-m", module, "--work", str(given.work)])
    run([sys.executable, "-m", "benchmarks.readme"])
    console.print(f"{(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
