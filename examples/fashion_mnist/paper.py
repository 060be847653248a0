"""What the paper claims, looked at on the distilled elastic model: python -m examples.fashion_mnist.paper

Whether decisions taken for each image are worth more than a schedule of the same compute (table 4); whether reusing
the residuals of blocks that nearly stayed closed is better than leaving them out, by margin and K (figure 6); whether
more is computed for images that hold more (figure 7). Nothing is trained. Every row is drawn once and kept in --work:
a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

import edit_compile
from edit_compile.files import save_tensors_atomically, write_file_atomically
from edit_compile.measuring.machine import commit, describe_machine, summary
from edit_compile.tuning.frozen import most_frequent
from examples.fashion_mnist.contestant import Contestant
from examples.fashion_mnist.data import CLASSES
from examples.fashion_mnist.finals import Final
from examples.fashion_mnist.paper_statistics import correlations, differences
from examples.fashion_mnist.rivals import RESULTS, bundles_in
from examples.fashion_mnist.rivals_tables import table_of
from examples.fashion_mnist.rivals_trials import Work
from examples.fashion_mnist.sample import FEW_STEPS, sample_patches
from runtime.routing.policy import SKIP, Decider

BRANCHES = ("cond", "uncond")
CALIBRATION = range(7000, 7025)
"""Seeds of the images by which the most frequent decisions are found: none of those that are judged."""
MARGINS = (0.1, 0.3)
REUSES = (1, 5)
Decisions = Mapping[str, np.ndarray]
"""By branch, (steps, blocks, rows): SKIP or a width."""
Policies = Callable[[int], Mapping[str, Decider]]
"""Those of both branches, for the batch of a seed."""


class Rows:
    """Draws images of the elastic model in few steps, and keeps them, with their share of FLOPs, in `folder`."""

    def __init__(self, elastic: edit_compile.CompiledTransformer, final: Final, work: Work, folder: Path) -> None:
        self.elastic, self.final, self.work, self.folder = elastic, final, work, folder
        self.seen: dict[int, Decisions] = {}

    def draw(self, labels: Tensor, seed: int, policies: Mapping[str, Decider]) -> Tensor:
        """One batch; what was decided is kept by its seed."""
        policy = edit_compile.BranchedPolicy(policies, self.elastic.policy)
        with self.elastic.request(), self.elastic.decided_by(policy):
            drawn = sample_patches(self.elastic, labels, steps=FEW_STEPS, seed=seed)
        grids = {name: self.elastic.trace[-1].grid(name) for name in BRANCHES}
        self.seen[seed] = {name: np.where(grid["done"] == 2, grid["width"], SKIP) for name, grid in grids.items()}
        return drawn

    def images(self, name: str, policies: Policies) -> tuple[Tensor, float]:
        """(images (N, 28, 28), share of FLOPs, without routers)."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            self.elastic.reset_counters()
            images, labels = self.final.drawn(lambda part, seed: self.draw(part, seed, policies(seed)))
            per_image = self.work.whole / len(self.final.labels[0])
            share = self.elastic.counters.flops / per_image / len(labels)
            kept = {"images": images, "share": torch.tensor(share, dtype=torch.float64)}
            if name == "adaptive":
                kept |= {
                    f"{seed} {branch}": torch.from_numpy(grid).float()
                    for seed, one in self.seen.items()
                    for branch, grid in one.items()
                }
            save_tensors_atomically(path, kept, {"commit": commit()})
        found = load_file(path)
        return found["images"], float(found["share"])

    def adaptive(self) -> dict[int, Decisions]:
        """What was decided in the row "adaptive", by seed."""
        kept, found = load_file(self.folder / "adaptive.safetensors"), dict[int, dict[str, np.ndarray]]()
        for name, grid in kept.items():
            if name not in ("images", "share"):
                seed, branch = name.split()
                found.setdefault(int(seed), {})[branch] = grid.double().numpy()
        return dict(found)

    def calibrated(self, policy: Decider) -> Decisions:
        """What is decided for other images, by branch (steps, blocks, images)."""
        everyone, count = [], len(self.final.labels[0])
        for seed in track(CALIBRATION, "most frequent decisions"):
            labels = (torch.arange(count) + count * seed) % len(CLASSES)  # all classes in turn
            self.draw(labels, seed, dict.fromkeys(BRANCHES, policy))
            everyone.append(self.seen[seed])
        return {name: np.concatenate([one[name] for one in everyone], 2) for name in BRANCHES}


def scheduled(table: np.ndarray) -> edit_compile.ScheduledPolicy:
    """Without routers: a schedule needs none."""
    return edit_compile.ScheduledPolicy(table, routed=False)


def static_rows(rows: Rows, policy: Decider) -> Iterator[tuple[str, Policies]]:
    """The router's decisions for each image, and schedules of as much compute."""
    yield "adaptive", lambda seed: dict.fromkeys(BRANCHES, policy)
    found, other = rows.calibrated(policy), rows.adaptive()
    by_branch = {name: scheduled(most_frequent(one)[0]) for name, one in found.items()}
    yield "static by branch", lambda seed: by_branch
    both = scheduled(most_frequent(np.concatenate([found[name] for name in BRANCHES], 2))[0])
    yield "static", lambda seed: dict.fromkeys(BRANCHES, both)
    # the next image's, of another class: exactly as much compute, spent without looking
    yield "another image's", lambda seed: {name: scheduled(np.roll(one, 1, 2)) for name, one in other[seed].items()}


def borderline_rows(threshold: float) -> Iterator[tuple[str, Policies]]:
    """Blocks whose gate lies in the margin: computed less often, by reuse, or left out."""
    for margin in MARGINS:
        for most in REUSES:
            policy = edit_compile.RoutingPolicy(threshold, margin, max_reuse=most)
            yield f"margin {margin}, reused up to {most}", lambda seed, policy=policy: dict.fromkeys(BRANCHES, policy)  # type: ignore[misc]
        skipped = edit_compile.RoutingPolicy(threshold + margin, 0.0, max_reuse=0)
        yield f"margin {margin}, left out", lambda seed, policy=skipped: dict.fromkeys(BRANCHES, policy)  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="bundles, and what is drawn")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8, help="images per batch")
    parser.add_argument("--output", type=Path, default=RESULTS / "paper.json")
    given = parser.parse_args()
    elastic, folder = bundles_in(given.work).elastic, given.work / "paper"
    folder.mkdir(parents=True, exist_ok=True)
    final = Final("dense", given.images, given.rows, given.work / "dense.safetensors")
    work = Work.counted(final.labels[0])
    rows, policy = Rows(elastic, final, work, folder), elastic.policy
    assert isinstance(policy, edit_compile.RoutingPolicy)
    labels, results, drawn = torch.cat(list(final.labels)), [], dict[str, Tensor]()
    for source in (static_rows(rows, policy), borderline_rows(policy.threshold)):
        for name, policies in source:
            images, share = rows.images(name, policies)
            drawn[name] = images
            results.append(final.figures(Contestant("elastic", name, lambda: final.draw_dense), images, labels, share))
    machine = describe_machine()
    seen = rows.adaptive()
    written: dict[str, object] = {"machine": machine, "commit": commit(), "images": given.images, "rows": given.rows}
    written |= {
        "seeds": f"5000 to {4999 + len(final.labels)}",
        "steps": FEW_STEPS,
        "calibration": len(CALIBRATION) * given.rows,
    }
    written |= {"policy": asdict(policy), "routers_share": work.routers_share}
    written |= {"results": [asdict(one) for one in results]}
    pairs = [("adaptive", name) for name in ("static by branch", "static", "another image's")]
    for margin in MARGINS:
        pairs += [(f"margin {margin}, reused up to {most}", f"margin {margin}, left out") for most in REUSES]
    written["differences"] = [{"of": a, "less": b} | differences(final, drawn[a], drawn[b]) for a, b in pairs]
    written["correlations"] = correlations(elastic, seen, final.target, labels)
    write_file_atomically(given.output, json.dumps(written, indent=1) + "\n")
    Console(width=160).print(table_of(results, f"{given.images} images, {FEW_STEPS} steps; {summary(machine)}"))
    print(json.dumps(written["differences"], indent=1), json.dumps(written["correlations"], indent=1))


if __name__ == "__main__":
    main()
