"""Routers that begin fully open, and others (table 5): python -m examples.fashion_mnist.starts

Distils the elastic model from the same recorded generations, with the same settings, for each start of its routers
and each seed, and draws --images images of every one. Trainings are shorter than that of the committed weights. Goes on
where it stopped: recordings, trainings and figures are kept in --work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy.stats import ttest_rel
from torch import nn

import edit_compile
from edit_compile.elastic.storage import load_elastic
from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.files import write_file_atomically
from edit_compile.measuring.machine import commit, describe_machine, summary
from examples.fashion_mnist.contestants_compiled import of
from examples.fashion_mnist.data import CLASSES, NO_CLASS
from examples.fashion_mnist.distil import taught
from examples.fashion_mnist.finals import Final, Result
from examples.fashion_mnist.model import CHANNELS, TOKENS, elastic_model, inputs, load_model
from examples.fashion_mnist.rivals import RESULTS
from examples.fashion_mnist.rivals_finals import Kept
from examples.fashion_mnist.rivals_tables import table_of
from examples.fashion_mnist.rivals_trials import Work
from examples.fashion_mnist.sample import FEW_STEPS
from examples.fashion_mnist.tune import recorded

BUDGET = 0.45


def at_random(elastic: ElasticTransformer) -> None:
    """Heads as torch begins any linear: gates about half open, any width."""
    for router in elastic.routers:
        for head in (router.gate, router.width):
            assert isinstance(head, nn.Linear)
            head.reset_parameters()


STARTS: Mapping[str, Callable[[ElasticTransformer], None]] = {
    "full capacity": lambda elastic: None,
    "random": at_random,
}


def name_of(start: str, seed: int) -> str:
    """Of a training."""
    return f"{start}, seed {seed}"


class Trainings:
    """All trainings, from one recording, in the folder `work`."""

    def __init__(self, work: Path, generations: int, rows: int, steps: int) -> None:
        self.work, self.steps = work, steps
        self.dense = load_model("dense")
        self.recording = recorded(self.dense, work / "calls", generations, rows, first_seed=100_000)
        edit_compile.order_channels(self.dense, [self.recording[0], self.recording[1]])

    def trained(self, start: str, seed: int) -> ElasticTransformer:
        """The elastic model that begins so, trained if it was not before."""
        folder = self.work / name_of(start, seed).replace(", ", " ").replace(" ", "-")
        if not (folder / "elastic").exists():
            elastic = elastic_model(self.dense)
            torch.manual_seed(seed)
            STARTS[start](elastic)
            taught(elastic, self.recording, folder, FEW_STEPS, BUDGET, self.steps, seed=seed)
            elastic.save_pretrained(folder / "elastic")
            self.dense = load_model("dense")  # trained in place
            edit_compile.order_channels(self.dense, [self.recording[0], self.recording[1]])
        return load_elastic(folder / "elastic")


def drawn(elastic: ElasticTransformer, name: str, final: Final, work: Work) -> Result:
    """Figures of a trained model's images."""
    x, t = torch.randn(2, TOKENS, CHANNELS), torch.tensor([0.3, 0.7])
    example = inputs(x, t, torch.tensor([len(CLASSES) - 1, NO_CLASS]))
    one = of("elastic", name, edit_compile.compile(elastic, inputs=example, engine="torch"), FEW_STEPS)
    draw = one.prepare()
    images, labels = final.drawn(draw)
    return final.figures(one, images, labels, work.share(one, draw, final.labels[0]))


def compared(by_start: Mapping[str, list[Result]]) -> list[dict[str, Any]]:
    """Full capacity less each other start, pairs of seeds, with Student's interval of 95%."""
    first, *others = by_start
    found = []
    for other in others:
        row: dict[str, Any] = {"of": first, "less": other}
        for figure in ("flops_share", "decibels", "distance", "accuracy"):
            ours, theirs = (np.array([getattr(one, figure) for one in by_start[name]]) for name in (first, other))
            known = ttest_rel(ours, theirs).confidence_interval(0.95)
            row |= {figure: float((ours - theirs).mean()), f"{figure}_interval": [float(known.low), float(known.high)]}
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="what is done so far")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--generations", type=int, default=24, help="that are recorded")
    parser.add_argument("--generation-rows", type=int, default=32, help="images in each")
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8, help="images per batch when drawn")
    parser.add_argument("--output", type=Path, default=RESULTS / "starts.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.work / "starts"
    folder.mkdir(parents=True, exist_ok=True)
    trainings = Trainings(folder, given.generations, given.generation_rows, given.train_steps)
    final = Final("dense", given.images, given.rows, given.work / "dense.safetensors")
    work, kept = Work.counted(final.labels[0]), Kept(folder / "drawn.json", given.images, given.rows)
    by_start: dict[str, list[Result]] = {start: [] for start in STARTS}
    for seed in range(given.seeds):
        for start, results in by_start.items():
            name = name_of(start, seed)
            if name not in kept.results:
                kept.results[name] = drawn(trainings.trained(start, seed), name, final, work)
                kept.write()
            results.append(kept.results[name])
    machine = describe_machine()
    written = {"machine": machine, "commit": commit(), "images": given.images, "rows": given.rows, "steps": FEW_STEPS}
    written |= {"seeds": f"5000 to {4999 + len(final.labels)}", "training_seeds": given.seeds, "budget": BUDGET}
    written |= {"train_steps": given.train_steps, "recorded": given.generations * given.generation_rows}
    written |= {"starts": {start: [asdict(one) for one in found] for start, found in by_start.items()}}
    written |= {"differences": compared(by_start)}
    write_file_atomically(given.output, json.dumps(written, indent=1) + "\n")
    everyone = [one for found in by_start.values() for one in found]
    Console(width=160).print(table_of(everyone, f"{given.images} images, {FEW_STEPS} steps; {summary(machine)}"))
    print(json.dumps(written["differences"], indent=1))


if __name__ == "__main__":
    main()
