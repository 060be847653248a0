"""Tuned tiers beside fewer steps and other caches: python -m examples.fashion_mnist.rivals --tuned tuned.edit

Every setting of every rival (see `contestants`) is tried on a few images; of each rival, the best in dB at each share
of the dense FLOPs goes into the final, with the tiers of the bundle, and, since tiers are compiled, with fewer steps of
the compiled model: dB to the dense model's images from the same noise, accuracy and Frechet distance of --images
images, and times faster than the dense model in eager mode, measured interleaved. All in batches of --rows: FirstBlock-
Cache and DBCache decide for a batch. Intervals are of 95%, by bootstrap over the images. Last, the interval that tuning
predicted for each tier, and how many means of --grouped batches lie in it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import edit_compile
from edit_compile.files import write_file_atomically
from edit_compile.measuring.machine import describe_machine, summary
from edit_compile.measuring.timing import interleaved
from examples.fashion_mnist.contestants import Contestant, Draw, everyone
from examples.fashion_mnist.data import CLASSES, from_patches
from examples.fashion_mnist.finals import Final, Held, Result, commit, decibels
from examples.fashion_mnist.sample import STEPS, sample_patches
from passes.graphs.cost import counting

SHARES = (0.5, 0.36, 0.25, 0.15)


@dataclass(frozen=True)
class Tried:
    """A setting on a few images: share of the dense FLOPs, and mean dB."""

    contestant: Contestant
    flops_share: float
    decibels: float


def flops_of(draw: Draw, labels: Tensor) -> int:
    """Floating-point operations of a batch."""
    with counting() as counter:
        draw(labels, 0)
    return int(counter.get_total_flops())


def tried(contestant: Contestant, labels: Tensor, dense: Sequence[Tensor], whole: int) -> Tried:
    """What a setting gives on batches whose dense images are known; the first is drawn twice, caches begin anew."""
    draw = contestant.prepare()
    draw(labels, 0)
    share = flops_of(draw, labels) / whole
    found = [decibels(from_patches(draw(labels, seed)), target) for seed, target in enumerate(dense)]
    return Tried(contestant, share, float(torch.cat(found).mean()))


def trials(
    contestants: Sequence[Contestant], labels: Tensor, dense: Sequence[Tensor], whole: int, path: Path
) -> list[Tried]:
    """All settings, tried once and kept in the file `path`, for the same images alone."""
    taken = {"machine": describe_machine(), "commit": commit()}
    of = f"{len(labels)} rows, {len(dense)} batches, {float(dense[0].double().sum()):.3f}"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    known: dict[str, tuple[float, float]] = kept.get(of, {})
    found = []
    for one in track(contestants, "rivals' settings"):
        name = one.name
        if name not in known:
            made = tried(one, labels, dense, whole)
            known[name] = made.flops_share, made.decibels
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file_atomically(path, json.dumps(taken | {of: known}, indent=1) + "\n")
        found.append(Tried(one, *known[name]))
    return found


def best_of(tries: Sequence[Tried], share: float) -> Iterator[Tried]:
    """Of each rival what is best within a share of FLOPs, if anything is."""
    for who in dict.fromkeys(one.contestant.who for one in tries):
        within = [one for one in tries if one.contestant.who == who and one.flops_share <= share + 0.01]
        if within:
            yield max(within, key=lambda one: one.decibels)


def finalists(tries: Sequence[Tried], bundle: Path) -> list[tuple[float, Contestant, float]]:
    """(share of FLOPs at most, who, share): the best rivals, and all of a bundle. Fewer steps are the bundle's."""
    chosen = [(at, one.contestant, one.flops_share) for at in SHARES for one in best_of(tries, at)]
    chosen = [one for one in chosen if one[1].who != "fewer steps"]
    for contestant, share in compiled_ones(bundle):
        chosen.append((min(at for at in (1.0, *SHARES) if at >= share - 0.01), contestant, share))
    return chosen


def compiled_ones(bundle: Path) -> Iterator[tuple[Contestant, float]]:
    """The tiers of a bundle, and fewer steps of it at full compute, with their share of FLOPs."""
    compiled = edit_compile.load(bundle, engine="torch")

    def prepare(name: str | None, steps: int = STEPS) -> Draw:
        def draw(labels: Tensor, seed: int) -> Tensor:
            compiled.tier = name
            with compiled.request():
                return sample_patches(compiled, labels, steps=steps, seed=seed)

        return draw

    for steps in (STEPS, *(int(STEPS * share) for share in SHARES)):
        settings = f"{steps} steps"
        yield Contestant("fewer steps, compiled", settings, lambda steps=steps: prepare(None, steps)), steps / STEPS  # type: ignore[misc]
    for name, tier in compiled.tiers.items():
        yield Contestant("tier", name, lambda name=name: prepare(name)), tier.flops_share or 1.0  # type: ignore[misc]


def times_faster(draws: dict[str, Draw], labels: Tensor, repeats: int) -> dict[str, float]:
    """Of each the seconds of "dense" over its own, medians over rounds in which all are drawn."""
    runs: dict[str, list[Callable[[], object]]] = {
        name: [lambda draw=draw: draw(labels, 0)]
        for name, draw in draws.items()  # type: ignore[misc]
    }
    seconds = interleaved(runs, repeats)
    return {name: float(np.median(seconds["dense"] / own)) for name, own in seconds.items()}


def table_of(results: Sequence[Result], caption: str) -> Table:
    """All finalists."""
    table = Table(
        "FLOPs at most", "who", "settings", "FLOPs", "times faster", "dB", "distance", "accuracy", caption=caption
    )
    for one in results:
        low, high = one.decibels_interval
        near, far = one.distance_interval
        table.add_row(
            f"{one.at:.0%}", one.who, one.settings, f"{one.flops_share:.0%}", f"{one.times_faster:.2f}",
            f"{one.decibels:.1f} ({low:.1f} to {high:.1f})", f"{one.distance:.1f} ({near:.1f} to {far:.1f})",
            f"{one.accuracy:.1%}",
        )  # fmt: skip
    return table


def held_table(held: Sequence[Held]) -> Table:
    """What tuning predicted, beside what came."""
    table = Table("tier", "predicted dB of a generation", "found", "means in the interval")
    for one in held:
        low, high = one.interval
        predicted = f"{one.predicted:.1f} ({low:.1f} to {high:.1f})"
        table.add_row(one.tier, predicted, f"{one.found:.1f}", f"{one.within:.0%} of those of {one.grouped}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", type=Path, default=Path("tuned.edit"), help="bundle with tiers of the dense model")
    parser.add_argument("--dense", default="dense")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8, help="images per batch, in the trials and when timed")
    parser.add_argument("--batches", type=int, default=2, help="batches in the trials")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--grouped", type=int, default=7, help="generations that tuning held out")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/rivals.json"))
    given = parser.parse_args()
    labels = torch.arange(given.rows) % len(CLASSES)
    final = Final(given.dense, given.images, given.rows)
    dense = [from_patches(final.draw_dense(labels, seed)) for seed in range(given.batches)]
    whole = flops_of(final.draw_dense, labels)
    contestants = list(everyone(given.dense))
    tries = trials(contestants, labels, dense, whole, given.output.with_suffix(".trials.json"))
    chosen = finalists(tries, given.tuned)
    draws = {contestant.name: contestant.prepare() for _, contestant, _ in chosen}
    faster = times_faster({"dense": final.draw_dense} | draws, labels, given.repeats)
    once = {contestant.name: (contestant, share) for _, contestant, share in chosen}  # some are best at several shares
    drawn = {
        name: final.result(contestant, 1.0, share, faster[name])
        for name, (contestant, share) in track(list(once.items()), "finalists")
    }
    results = [replace(drawn[contestant.name], at=at) for at, contestant, _ in chosen]
    results.sort(key=lambda one: (-one.at, -one.decibels))
    base = final.result(Contestant("dense", "28 steps", lambda: final.draw_dense), 1.0, 1.0, 1.0)
    tiers = edit_compile.load(given.tuned, engine="torch").tiers
    held = [
        final.held(contestant.settings, tiers[contestant.settings], contestant.prepare(), given.grouped)
        for contestant, _ in once.values()
        if contestant.who == "tier"
    ]
    machine = describe_machine()
    written: dict[str, object] = {"machine": machine, "commit": commit(), "images": given.images, "rows": given.rows}
    written |= {"seeds": "5000 to " + str(4999 + len(final.labels)), "tried": len(tries)}
    written |= {"results": [asdict(one) for one in (base, *results)], "held_out": [asdict(one) for one in held]}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(given.output, json.dumps(written, indent=1, default=str) + "\n")
    caption = f"{given.images} images, timed by {given.rows}; {summary(machine)}"
    console = Console(width=160)
    console.print(table_of((base, *results), caption))
    console.print(held_table(held))


if __name__ == "__main__":
    main()
