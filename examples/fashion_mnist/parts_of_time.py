"""What the time of a call of the distilled model is made of: python -m examples.fashion_mnist.parts_of_time

Ten images, 7 steps, on each engine, in turns in one process: the dense model compiled, the elastic one, the elastic
one by what its routers decide most often ("frozen": a schedule for each branch of guidance), by the very same decisions
without routers, by those with all rows that a block is computed for at the widest of their widths, which is the least
that rows computed together under a mask could take, and with nothing computed. Differences tell what routers and blocks
take, beside what the blocks' FLOPs would allow. Writes benchmarks/results/example_time.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import edit_compile
from edit_compile.files import write_file_atomically
from edit_compile.measuring.machine import commit, describe_machine, summary
from edit_compile.measuring.timing import Spread, interleaved
from examples.fashion_mnist.data import CLASSES, NO_CLASS
from examples.fashion_mnist.model import CHANNELS, TOKENS, inputs, load_model
from examples.fashion_mnist.paper import BRANCHES
from examples.fashion_mnist.rivals import RESULTS
from examples.fashion_mnist.sample import FEW_STEPS, sample_patches
from runtime.requests.trace import COMPUTED
from runtime.routing.policy import SKIP, Decider

ENGINES = ("inductor", "torch", "onnxruntime")
CALLS = FEW_STEPS * len(BRANCHES)


def drawn(compiled: edit_compile.CompiledTransformer, policy: Decider | None = None) -> None:
    """An image of each class."""
    with compiled.request(), compiled.decided_by(policy or compiled.policy):
        sample_patches(compiled, torch.arange(10), steps=FEW_STEPS)


def decisions(elastic: edit_compile.CompiledTransformer) -> dict[str, np.ndarray]:
    """What the routers decided last, by branch (steps, blocks, rows)."""
    grids = {name: elastic.trace[-1].grid(name) for name in BRANCHES}
    return {name: np.where(grid["done"] == COMPUTED, grid["width"], SKIP) for name, grid in grids.items()}


def without_routers(tables: Mapping[str, np.ndarray]) -> Decider:
    """The policy that decides by `tables`."""
    branches = {name: edit_compile.ScheduledPolicy(table, routed=False) for name, table in tables.items()}
    return edit_compile.BranchedPolicy(branches, edit_compile.RoutingPolicy())


def at_the_widest(table: np.ndarray) -> np.ndarray:
    """`table` (steps, blocks, rows) with all rows that compute a block at the widest of their widths."""
    return np.where(table > SKIP, table.max(-1, keepdims=True), table)


def share_of(elastic: edit_compile.CompiledTransformer, dense: edit_compile.CompiledTransformer) -> float:
    """FLOPs of the blocks, of those of the dense model's."""
    glue = dense.program.manifest.glues[0].flops * 10 * CALLS
    found = []
    for one in (elastic, dense):
        one.reset_counters()
        drawn(one)
        found.append(one.counters.flops - glue)
    return found[0] / found[1]


def parts(engine: str, repeats: int) -> dict[str, object]:
    """Milliseconds of a call on `engine`, and what they are made of."""
    x, t = torch.randn(2, TOKENS, CHANNELS), torch.tensor([0.3, 0.7])
    example = inputs(x, t, torch.tensor([len(CLASSES) - 1, NO_CLASS]))
    dense, elastic = (
        edit_compile.compile(load_model(name), inputs=example, engine=engine) for name in ("dense", "elastic")
    )
    drawn(elastic)
    same, frozen = decisions(elastic), edit_compile.freeze(elastic, last=1)
    policies = {
        "frozen": frozen.policy,
        "without routers": without_routers(same),
        "rows together": without_routers({name: at_the_widest(table) for name, table in same.items()}),
        "nothing computed": without_routers({name: np.zeros(table.shape[:2]) for name, table in same.items()}),
    }
    runs: dict[str, Callable[[], None]] = {
        "dense": partial(drawn, dense),
        "elastic": partial(drawn, elastic),
        **{name: partial(drawn, elastic, policy) for name, policy in policies.items()},
    }
    seconds = interleaved({name: [run] for name, run in runs.items()}, repeats)
    took = {name: own[:, 0] / CALLS * 1e3 for name, own in seconds.items()}
    left = share_of(elastic, dense)
    base = took["nothing computed"]
    made_of = {
        "routers": took["elastic"] - took["without routers"],
        "blocks": took["without routers"] - base,
        "blocks, as their FLOPs allow": left * (took["dense"] - base),
    }
    told: dict[str, object] = {name: asdict(Spread.of(own)) for name, own in {**took, **made_of}.items()}
    return {
        "engine": engine,
        "ms": told,
        "block_flops_left": left,
        "agreement": dict(frozen.agreement),
        "times_faster": asdict(Spread.of(took["dense"] / took["elastic"])),
        "times_faster_frozen": asdict(Spread.of(took["dense"] / took["frozen"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS / "example_time.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [parts(engine, given.repeats) for engine in ENGINES]
    machine = describe_machine()
    written = {"machine": machine, "commit": commit(), "images": 10, "steps": FEW_STEPS, "engines": found}
    write_file_atomically(given.output, json.dumps(written, indent=1) + "\n")
    table = Table(
        "engine", "dense / elastic", "dense / frozen", *found[0]["ms"], caption=f"ms of a call; {summary(machine)}"
    )  # type: ignore[misc]
    for one in found:
        ratios = (f"{one[name]['median']:.2f}" for name in ("times_faster", "times_faster_frozen"))  # type: ignore[index]
        ms = (f"{spread['median']:.2f}" for spread in one["ms"].values())  # type: ignore[attr-defined]
        table.add_row(str(one["engine"]), *ratios, *ms)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
