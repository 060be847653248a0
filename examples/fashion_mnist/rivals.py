"""Tuned tiers beside fewer steps and other caches: python -m examples.fashion_mnist.rivals

Every setting of every rival (see `contestants`) is tried on a few images, and the best of each at each share of the
dense FLOPs is told. The two best of each share go into the final, with tiers, fewer steps of the compiled model, the
distilled elastic model, and torch.compile: dB to the dense model's images from the same noise, accuracy and Frechet
distance of --images images, and times faster than the dense model in eager mode, measured interleaved in one process.
All in batches of --rows: FirstBlockCache and the caches of cache-dit decide for a batch. Intervals are of 95%, by
bootstrap over the images. Last, the interval that tuning predicted for each tier, and how many means of --grouped
batches lie in it.

Bundles that --work lacks are made there, and what was tried or drawn is kept there: a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

import edit_compile
from edit_compile.files import write_file_atomically
from edit_compile.measuring.machine import describe_machine, summary
from edit_compile.measuring.timing import interleaved
from examples.fashion_mnist.contestant import Contestant, Draw
from examples.fashion_mnist.contestants import everyone
from examples.fashion_mnist.contestants_compiled import Bundles, compiled_ones, other_engines
from examples.fashion_mnist.contestants_hooks import on_compiled_blocks
from examples.fashion_mnist.data import CLASSES, NO_CLASS, from_patches
from examples.fashion_mnist.finals import Final, Result, commit, decibels, share_interval
from examples.fashion_mnist.model import CHANNELS, TOKENS, inputs, load_model
from examples.fashion_mnist.rivals_tables import held_table, table_of
from examples.fashion_mnist.rivals_trials import SHARES, Work, best_of, chosen_of, told_of, trials

RESULTS = Path("benchmarks/results")
ALIKE = 60.0
"""dB that one draws like another at least."""


def bundles_in(work: Path) -> Bundles:
    """The bundles in `work`; those that are missing are made, which takes minutes."""
    if not (work / "tuned.edit").exists():
        options = ["--output", work / "tuned.edit", "--generations", 10, "--results", RESULTS / "tuned.json"]
        subprocess.run([sys.executable, "-m", "examples.fashion_mnist.tune", *map(str, options)], check=True)
    if not (work / "elastic.edit").exists():
        x, t = torch.randn(2, TOKENS, CHANNELS), torch.tensor([0.3, 0.7])
        example = inputs(x, t, torch.tensor([len(CLASSES) - 1, NO_CLASS]))
        edit_compile.compile(load_model("elastic"), inputs=example, engine="torch", output=work / "elastic.edit")
    return Bundles(*(edit_compile.load(work / f"{name}.edit", engine="torch") for name in ("tuned", "elastic")))


def finals(chosen: Sequence[Contestant], share_of: dict[str, float], final: Final, path: Path) -> dict[str, Result]:
    """Of each contestant its figures, drawn once and kept in the file `path`, for the same images alone."""
    of = f"{len(torch.cat(list(final.labels)))} images, {len(final.labels[0])} rows"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    known = {name: Result(**told) for name, told in kept.get(of, {}).items()}
    for one in track(chosen, "finalists"):
        if one.name in known:
            continue
        if one.same_as:
            labels = final.labels[0]
            twin = next(other for other in chosen if other.name == one.same_as)
            apart = decibels(*(from_patches(each.prepare()(labels, 5000)) for each in (one, twin)))
            if float(apart.min()) < ALIKE:
                raise ValueError(f"{one.name} does not draw what {twin.name} draws: {apart.min():.1f} dB")
            known[one.name] = replace(
                known[twin.name], who=one.who, settings=one.settings, same_as=twin.name, apart=float(apart.min())
            )
        else:
            known[one.name] = final.result(one, share_of[one.name])
        kept[of] = {name: asdict(result) for name, result in known.items()}
        write_file_atomically(path, json.dumps(kept, indent=1) + "\n")
    return {one.name: known[one.name] for one in chosen}


def take_over(recorded: Path, path: Path) -> None:
    """Put what an earlier run recorded into the file `path` of drawn finalists, with the commit it was drawn at."""
    told = json.loads(recorded.read_text())
    of, found = f"{told['images']} images, {told['rows']} rows", dict[str, object]()
    for one in told["results"]:
        right = share_interval(round(one["accuracy"] * told["images"]), told["images"])
        found[f"{one['who']}: {one['settings']}"] = {"accuracy_interval": right, "commit": told["commit"]} | one
    kept = json.loads(path.read_text()) if path.is_file() else {}
    write_file_atomically(path, json.dumps(kept | {of: found | kept.get(of, {})}, indent=1) + "\n")


def times_faster(draws: dict[str, Draw], labels: torch.Tensor, repeats: int) -> tuple[dict[str, float], str]:
    """Of each the seconds of "dense" over its own, medians over rounds in which all are drawn; what was warned of."""
    runs: dict[str, list[Callable[[], object]]] = {name: [partial(draw, labels, 0)] for name, draw in draws.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seconds = interleaved(runs, repeats)
    told = [str(one.message) for one in caught if "waited for a core" in str(one.message)]
    return {name: float(np.median(seconds["dense"] / own)) for name, own in seconds.items()}, " ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="bundles, and what is done so far")
    parser.add_argument("--dense", default="dense")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8, help="images per batch, in the trials and when timed")
    parser.add_argument("--batches", type=int, default=2, help="batches in the trials")
    parser.add_argument("--leaders", type=int, default=2, help="rivals of each share that are drawn in full")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--grouped", type=int, default=7, help="generations that tuning held out")
    parser.add_argument("--output", type=Path, default=RESULTS / "rivals.json")
    parser.add_argument("--take-over", action="store_true", help="what --output and its trials say already is kept")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    tried, drawn = given.output.with_suffix(".trials.json"), given.work / "finals.json"
    if given.take_over:
        take_over(given.output, drawn)
    elif not drawn.exists():
        tried.unlink(missing_ok=True)
    bundles = bundles_in(given.work)
    labels = torch.arange(given.rows) % len(CLASSES)
    final = Final(given.dense, given.images, given.rows, given.work / "dense.safetensors")
    dense = [from_patches(final.draw_dense(labels, seed)) for seed in range(given.batches)]
    work = Work.counted(labels)
    tries = trials(everyone(given.dense, bundles), labels, dense, work, tried)
    before = json.loads(drawn.read_text()) if drawn.exists() else {}
    already = {name for known in before.values() for name in known}
    chosen = chosen_of(tries, compiled_ones(bundles), work, given.leaders, already)
    inductor = partial(edit_compile.load, given.work / "tuned.edit", engine="inductor")
    once = {one.name: one for _, one, _ in chosen}
    twins = (*other_engines(inductor, given.dense), *on_compiled_blocks(given.dense, list(once)))
    once |= {one.name: one for one in twins}
    share_of = {one.name: share for _, one, share in chosen}
    found = finals(list(once.values()), share_of, final, drawn)
    faster, waits = times_faster(
        {"dense": final.draw_dense} | {n: c.prepare() for n, c in once.items()}, labels, given.repeats
    )
    results = [replace(found[one.name], at=at, times_faster=faster[one.name]) for at, one, _ in chosen]
    results += [replace(one, times_faster=faster[name]) for name, one in found.items() if one.same_as]
    results.sort(key=lambda one: (-one.at, -one.decibels))
    base = final.figures(
        Contestant("dense", "28 steps", lambda: final.draw_dense), final.target, torch.cat(list(final.labels)), 1.0
    )
    tiers = bundles.dense.tiers
    held = [
        final.held(one.settings, tiers[one.settings], one.prepare(), given.grouped)
        for one in once.values()
        if one.who == "tier"
    ]
    machine = describe_machine()
    if "cache-dit" in (one.metadata["Name"] for one in metadata.distributions()):
        machine["cache-dit"] = metadata.version("cache-dit")
    written: dict[str, object] = {"machine": machine, "commit": commit(), "images": given.images, "rows": given.rows}
    written |= {"seeds": "5000 to " + str(4999 + len(final.labels)), "tried": len(tries), "repeats": given.repeats}
    written |= {"routers_share": work.routers_share, "waits": waits, "shares": (0.75, *SHARES)}
    best = [(at, one) for at in (0.75, *SHARES) for one in best_of(tries, at)]
    written |= {"trial_images": given.rows * given.batches}
    written |= {"trials": [told_of(at, one) for at, one in best]}
    written |= {"results": [asdict(one) for one in (base, *results)], "held_out": [asdict(one) for one in held]}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(given.output, json.dumps(written, indent=1, default=str) + "\n")
    console = Console(width=160)
    console.print(table_of((base, *results), f"{given.images} images, timed by {given.rows}; {summary(machine)}"))
    console.print(held_table(held))


if __name__ == "__main__":
    main()
