"""The demo's second half: tiers of the dense model in 28 steps, beside plain steps and caches that take their time.

Tiers decide as `examples.fashion_mnist.tune` recorded it; nothing is tuned here. Which settings of a rival take a
tier's time is taken from benchmarks/results/rivals.json; the times shown are measured anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import edit_compile
from edit_compile.measuring.timing import Call, Spread, interleaved
from examples.fashion_mnist.contestant import Contestant, Draw
from examples.fashion_mnist.contestants import fewer_steps
from examples.fashion_mnist.contestants_compiled import of
from examples.fashion_mnist.contestants_hooks import first_block_cache, mag_cache, taylor_seer
from examples.fashion_mnist.data import CLASSES, from_patches
from examples.fashion_mnist.finals import decibels
from examples.fashion_mnist.sample import STEPS, sample_patches, save_grid

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SHOWN = 20


@dataclass(frozen=True)
class TierRow:
    """A way to sample in the time of `beside`, a tier: `ratio` to the dense model, dB to its images of that noise."""

    name: str
    beside: str
    ratio: Spread
    decibels: float | None
    grid: str


def tiers(compiled: edit_compile.CompiledTransformer) -> Iterator[Contestant]:
    """Those of benchmarks/results/tuned.json."""
    blocks = len(compiled.program.manifest.blocks)
    for one in json.loads((RESULTS / "tuned.json").read_text())["tiers"]:
        table = np.repeat(np.array(one["decisions"])[:, None], blocks, 1)
        yield of("tier", one["tier"], compiled, STEPS, edit_compile.ScheduledPolicy(table, routed=False))


def rivals_of(tier: str) -> Iterator[Contestant]:
    """Of each kind the one that was recorded as taking no longer than `tier` and being nearest to the dense images."""
    recorded = json.loads((RESULTS / "rivals.json").read_text())["results"]
    least = next(one["times_faster"] for one in recorded if (one["who"], one["settings"]) == ("tier", tier))
    kinds: Mapping[str, Callable[[str], Iterator[Contestant]]] = {
        "fewer steps": fewer_steps,
        "TaylorSeer": taylor_seer,
        "MagCache": mag_cache,
        "FirstBlockCache": first_block_cache,
    }
    for who, everyone in kinds.items():
        told = {"fewer steps, compiled"} if who == "fewer steps" else {who}
        fast = [one for one in recorded if one["who"] in told and one["times_faster"] >= least]
        if fast:
            best = max(fast, key=lambda one: one["decibels"])["settings"]
            yield next(one for one in everyone("dense") if one.settings == best)


def measure_tiers(dense: Any, compiled: edit_compile.CompiledTransformer, folder: Path, repeats: int) -> list[TierRow]:
    """Dense, each tier, and each rival in its time: timed in turns on ten images; pictures of SHOWN go to `folder`."""
    labels = torch.arange(SHOWN) % len(CLASSES)
    found: dict[str, tuple[str, Draw]] = {"dense, 28 steps": ("", partial(_drawn, dense))}
    for tier in tiers(compiled):
        found[tier.name] = tier.settings, tier.prepare()
        for rival in rivals_of(tier.settings):
            found.setdefault(rival.name, (tier.settings, rival.prepare()))
    ten = torch.arange(len(CLASSES))
    runs: dict[str, list[Call]] = {name: [partial(draw, ten, 0)] for name, (_, draw) in found.items()}
    with torch.no_grad():
        seconds = interleaved(runs, repeats)
    base, target, rows = seconds["dense, 28 steps"].sum(1), None, []
    for number, (name, (beside, draw)) in enumerate(found.items()):
        images = from_patches(draw(labels, 0))
        target = images if target is None else target
        grid = f"tiers-{number}.png"
        save_grid(images.clamp(-1, 1), folder / grid)
        near = float(decibels(images, target).mean()) if number else None
        rows.append(TierRow(name, beside, Spread.of(base / seconds[name].sum(1)), near, grid))
    return rows


def _drawn(model: Any, labels: Tensor, seed: int) -> Tensor:
    return sample_patches(model, labels, seed=seed)
