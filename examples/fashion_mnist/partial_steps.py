"""Whether to compute a step in part: python -m examples.fashion_mnist.partial_steps

A tuned schedule computes some steps in full and reuses all residuals in the others. Here it is thinned out: of its
computed steps, single blocks are made to reuse their residuals, extrapolated, or to run at a smaller width (channels in
the order of their importance, see `edit_compile.order_channels`), those first that cost the least quality for the FLOPs
they save. Beside it stands what tuning finds for the same FLOPs, with whole steps alone. Some minutes.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table

import edit_compile
from edit_compile.calls.generations import Generation
from edit_compile.files import write_file_atomically
from edit_compile.measuring.machine import commit, describe_machine, summary
from examples.fashion_mnist.model import load_model
from examples.fashion_mnist.tune import FIRST_SEED, recorded
from runtime.routing.policy import EXTRAPOLATE
from runtime.routing.schedule import ScheduledPolicy

KINDS = {"blocks reused": (EXTRAPOLATE,), "blocks narrowed": (0.25, 0.5, 0.75)}
Decisions = npt.NDArray[np.float64]
Change = tuple[int, int, float]
"""A step, a block, and what is decided for it."""


class Replays:
    """Replays of generations by one compiled model: squared error in the end, and share of the dense FLOPs."""

    def __init__(self, compiled: edit_compile.CompiledTransformer, generations: Sequence[Generation]) -> None:
        self.compiled = compiled
        self._pairs = [(one, edit_compile.Sampler.fit(one)) for one in generations]

    def __call__(self, decisions: Decisions) -> tuple[float, float]:
        """(mean dB, share of FLOPs)."""
        self.compiled.reset_counters()
        with self.compiled.decided_by(ScheduledPolicy(decisions, routed=False)):
            found = [
                edit_compile.quality(edit_compile.replay(self.compiled, one, sampler), one)
                for one, sampler in self._pairs
            ]
        counters = self.compiled.counters
        return float(np.mean(found)), counters.flops / counters.dense_flops


def changes(decisions: Decisions, kinds: Sequence[float]) -> Iterator[Change]:
    """All that can be changed in computed steps but the first."""
    for step in np.flatnonzero((decisions == 1.0).all(1))[1:]:
        for block in range(decisions.shape[1]):
            for kind in kinds:
                yield int(step), block, kind


def thinned(one: Replays, decisions: Decisions, kinds: Sequence[float], share: float) -> Decisions:
    """`decisions` with the changes that cost least, each on its own, until at most `share` of the FLOPs is left."""
    before, whole = one(decisions)
    rated = []
    for step, block, kind in track(list(changes(decisions, kinds)), "single changes"):
        changed = decisions.copy()
        changed[step, block] = kind
        decibels, left = one(changed)
        error = 10 ** (-decibels / 10) - 10 ** (-before / 10)
        rated.append((error / (whole - left), whole - left, step, block, kind))
    changed, saved = decisions.copy(), dict[tuple[int, int], float]()
    for _, saves, step, block, kind in sorted(rated):
        if whole - sum(saved.values()) <= share:
            break
        if saves > saved.get((step, block), 0.0):  # a narrower width may come after a wider one
            changed[step, block], saved[step, block] = kind, saves
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.36)
    parser.add_argument("--generations", type=int, default=10, help="two to rate changes on, the rest held out")
    parser.add_argument("--results", type=Path, help="write the table's figures as this JSON file")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*has no routers")
    model = load_model("dense")
    with TemporaryDirectory() as folder:
        recording = list(recorded(model, Path(folder), given.generations, rows=8))
    edit_compile.order_channels(model, recording[:2], centre=True)
    compiled = edit_compile.compile(model, inputs=recording[0].calls[0].arguments, engine="torch")
    budget = {"whole": given.share, "more": given.share * 4 / 3}
    tuned = edit_compile.tune(compiled, recording, budget=budget, held_out=len(recording) - 2, repeats=1)
    rating, held_out = Replays(compiled, recording[:1]), Replays(compiled, recording[2:])
    table = Table("what is computed in part", "FLOPs", "dB, held out")
    found = []
    begun = tuned.tiers["more"].policy
    assert isinstance(begun, ScheduledPolicy)
    rows = {f"nothing, {tuned.computed_steps[name]} steps": tuned.tiers[name].policy.table for name in budget}
    rows |= {
        f"{name}, of {tuned.computed_steps['more']} steps": thinned(rating, begun.table, kinds, given.share)
        for name, kinds in KINDS.items()
    }
    for name, decisions in rows.items():
        decibels, share = held_out(decisions)
        table.add_row(name, f"{share:.1%}", f"{decibels:.1f}")
        found.append({"what": name, "flops_share": share, "decibels": decibels})
    machine = describe_machine()
    table.caption = f"{len(recording) - 2} generations of 8 images; {summary(machine)}"
    Console().print(table)
    if given.results is not None:
        written = {"machine": machine, "commit": commit(), "first_seed": FIRST_SEED, "held_out": len(recording) - 2}
        write_file_atomically(given.results, json.dumps(written | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
