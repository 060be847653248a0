"""Tuned tiers beside fewer steps and other caches: python -m examples.fashion_mnist.rivals

Every setting of every rival (see `contestants`) is tried on a few images, and the best of each at each share of the
dense FLOPs is told. The three best of each share go into the final, with tiers, fewer steps of the compiled model, the
distilled elastic model, and torch.compile: dB to the dense model's images from the same noise, accuracy and Frechet
distance of --images images, and times faster than the dense model in eager mode, by seconds of the processor, on one
thread, all in turns in one process.
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
import time
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

import edit_compile
from edit_compile.files import write_file_atomically
from edit_compile.measuring.machine import commit, describe_machine, summary
from examples.fashion_mnist.contestant import Contestant, Draw
from examples.fashion_mnist.contestants import everyone
from examples.fashion_mnist.contestants_compiled import Bundles, compiled_ones, other_engines
from examples.fashion_mnist.contestants_hooks import on_compiled_blocks
from examples.fashion_mnist.data import CLASSES, NO_CLASS, from_patches
from examples.fashion_mnist.finals import Final
from examples.fashion_mnist.model import CHANNELS, TOKENS, inputs, load_model
from examples.fashion_mnist.rivals_finals import Kept, draw_finals
from examples.fashion_mnist.rivals_tables import held_table, table_of
from examples.fashion_mnist.rivals_trials import ROOMY, SHARES, Work, best_of, chosen_of, forget, told_of, trials
from examples.fashion_mnist.sample import STEPS

RESULTS = Path("benchmarks/results")


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


def times_faster(draws: dict[str, Draw], labels: torch.Tensor, repeats: int) -> dict[str, float]:
    """Of each the seconds of "dense" over its own, the least of rounds in which all are drawn, after one untimed round.

    Seconds are those of the processor, of which other work on the machine takes none but by caches and memory that are
    shared, which only adds to them; on one thread, which `main` sees to, they are what the clock would show.
    """
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    order = list(draws)
    for repeat in track(range(-1, repeats), "rounds of times"):
        order.reverse()
        for name in order:
            began = time.process_time()
            draws[name](labels, 0)
            if repeat >= 0:
                seconds[name].append(time.process_time() - began)
    return {name: min(seconds["dense"]) / min(own) for name, own in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="bundles, and what is done so far")
    parser.add_argument("--dense", default="dense")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8, help="images per batch, in the trials and when timed")
    parser.add_argument("--batches", type=int, default=2, help="batches in the trials")
    parser.add_argument("--no-draw", action="store_true", help="leave out what was not drawn before")
    parser.add_argument("--leaders", type=int, default=3, help="rivals of each share that are drawn in full")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--grouped", type=int, default=7, help="generations that tuning held out")
    parser.add_argument("--output", type=Path, default=RESULTS / "rivals.json")
    parser.add_argument("--take-over", action="store_true", help="what --output and its trials say already is kept")
    parser.add_argument("--anew", metavar="WHO", help="try and draw again what is by those whose name begins so")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    tried, kept = given.output.with_suffix(".trials.json"), Kept(given.work / "finals.json", given.images, given.rows)
    if given.take_over:
        kept.take_over(given.output)
    elif not kept.results:
        tried.unlink(missing_ok=True)
    if given.anew:
        kept.forget(given.anew)
        forget(tried, given.anew)
    bundles = bundles_in(given.work)
    labels = torch.arange(given.rows) % len(CLASSES)
    final = Final(given.dense, given.images, given.rows, given.work / "dense.safetensors")
    dense = [from_patches(final.draw_dense(labels, seed)) for seed in range(given.batches)]
    work = Work.counted(labels)
    tries = trials(everyone(given.dense, bundles), labels, dense, work, tried)
    chosen = chosen_of(tries, compiled_ones(bundles), work, given.leaders, set(kept.results))
    if given.no_draw:
        chosen = [(at, one, share) for at, one, share in chosen if one.name in kept.results]
    inductor = partial(edit_compile.load, given.work / "tuned.edit", engine="inductor")
    once = {one.name: one for _, one, _ in chosen}
    twins = [*other_engines(inductor, given.dense), *on_compiled_blocks(given.dense, list(once))]
    twins = [one for one in twins if one.same_as in once]
    once |= {one.name: one for one in twins}
    shares = {one.name: share for _, one, share in chosen}
    draw_finals(list(once.values()), shares, final, kept, bundles.dense.tiers, given.grouped)
    draws = {"dense": final.draw_dense} | {name: one.prepare() for name, one in once.items()}
    faster = times_faster(draws, labels, given.repeats)
    results = [replace(kept.results[one.name], at=at, times_faster=faster[one.name]) for at, one, _ in chosen]
    results += [replace(kept.results[one.name], times_faster=faster[one.name]) for one in twins]
    results.sort(key=lambda one: (-one.at, -one.decibels))
    base = Contestant("dense", f"{STEPS} steps", lambda: final.draw_dense)
    if base.name not in kept.results:
        kept.results[base.name] = final.figures(base, final.target, torch.cat(list(final.labels)), 1.0)
    results.insert(0, kept.results[base.name])
    held = [kept.held[name] for name in bundles.dense.tiers]
    machine = describe_machine()
    if "cache-dit" in (one.metadata["Name"] for one in metadata.distributions()):
        machine["cache-dit"] = metadata.version("cache-dit")
    written: dict[str, object] = {"machine": machine, "commit": commit(), "images": given.images, "rows": given.rows}
    written |= {
        "seeds": "5000 to " + str(4999 + len(final.labels)),
        "tried": len(tries),
        "repeats": given.repeats,
        "seconds": "processor time",
    }
    written |= {"routers_share": work.routers_share, "shares": (ROOMY, *SHARES)}
    best = [(at, one) for at in (ROOMY, *SHARES) for one in best_of(tries, at)]
    written |= {"trial_images": given.rows * given.batches}
    written |= {"trials": [told_of(at, one) for at, one in best]}
    written |= {"results": [asdict(one) for one in results], "held_out": [asdict(one) for one in held]}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(given.output, json.dumps(written, indent=1, default=str) + "\n")
    console = Console(width=160)
    console.print(table_of(results, f"{given.images} images, timed by {given.rows}; {summary(machine)}"))
    console.print(held_table(held))


if __name__ == "__main__":
    main()
