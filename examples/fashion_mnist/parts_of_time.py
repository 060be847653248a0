"""What the time of a call of the distilled model is made of: python -m examples.fashion_mnist.parts_of_time

Ten images, 7 steps, on each engine, in turns in one process: the dense model compiled, the elastic one, the elastic
one by the same decisions without routers, and with nothing computed. Differences tell what routers and blocks take,
beside what the blocks' FLOPs would allow. Writes benchmarks/results/example_time.json.
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
from examples.fashion_mnist.paper import BRANCHES, ByBranch, scheduled
from examples.fashion_mnist.rivals import RESULTS
from examples.fashion_mnist.sample import FEW_STEPS, sample_patches
from runtime.routing.policy import SKIP, Decider

ENGINES = ("inductor", "torch", "onnxruntime")
CALLS = FEW_STEPS * len(BRANCHES)


def drawn(compiled: edit_compile.CompiledTransformer, policies: Mapping[str, Decider] | None = None) -> None:
    """An image of each class, decided by each branch's policy where there are any."""
    with compiled.request():
        sample_patches(ByBranch(compiled, policies) if policies else compiled, torch.arange(10), steps=FEW_STEPS)


def decisions(elastic: edit_compile.CompiledTransformer) -> dict[str, Decider]:
    """What the routers decide, as schedules without them."""
    drawn(elastic)
    grids = {name: elastic.trace[-1].grid(name) for name in BRANCHES}
    return {name: scheduled(np.where(grid["done"] == 2, grid["width"], SKIP)) for name, grid in grids.items()}


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
    same = decisions(elastic)
    nothing = dict.fromkeys(BRANCHES, scheduled(np.full((FEW_STEPS, len(elastic.program.manifest.blocks)), SKIP)))
    runs: dict[str, Callable[[], None]] = {
        "dense": partial(drawn, dense),
        "elastic": partial(drawn, elastic),
        "without routers": partial(drawn, elastic, same),
        "nothing computed": partial(drawn, elastic, nothing),
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
        "times_faster": asdict(Spread.of(took["dense"] / took["elastic"])),
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
    table = Table("engine", "dense / elastic", *found[0]["ms"], caption=f"ms of a call; {summary(machine)}")  # type: ignore[misc]
    for one in found:
        ms = (f"{spread['median']:.2f}" for spread in one["ms"].values())  # type: ignore[attr-defined]
        table.add_row(str(one["engine"]), f"{one['times_faster']['median']:.2f}", *ms)  # type: ignore[index]
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
