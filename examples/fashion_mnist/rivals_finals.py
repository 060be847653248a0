"""Finalists drawn in full, once: their figures are kept, so that a run that was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from edit_compile.files import write_file_atomically
from examples.fashion_mnist.contestant import Contestant
from examples.fashion_mnist.data import from_patches
from examples.fashion_mnist.finals import Final, Held, Result, decibels, share_interval

ALIKE = 60.0
"""dB that one draws like another at least."""


class Kept:
    """Figures of finalists, and what was predicted of tiers, in the file `path`, for the same images alone."""

    def __init__(self, path: Path, images: int, rows: int) -> None:
        self.path, self.of = path, f"{images} images, {rows} rows"
        told = json.loads(path.read_text()).get(self.of, {}) if path.is_file() else {}
        self.results = {name: Result(**one) for name, one in told.get("results", {}).items()}
        self.held = {name: Held(**one) for name, one in told.get("held", {}).items()}

    def write(self) -> None:
        """What is known by now."""
        told = {"results": {name: asdict(one) for name, one in self.results.items()}}
        told |= {"held": {name: asdict(one) for name, one in self.held.items()}}
        write_file_atomically(self.path, json.dumps({self.of: told}, indent=1) + "\n")

    def forget(self, who: str) -> None:
        """Draw again what is by those whose name begins so, and what draws the same."""
        for name, one in list(self.results.items()):
            if one.who.startswith(who) or one.same_as.startswith(who):
                del self.results[name]

    def take_over(self, recorded: Path) -> None:
        """What an earlier run wrote as its output, with the commit that it was drawn at."""
        told = json.loads(recorded.read_text())
        if f"{told['images']} images, {told['rows']} rows" != self.of:
            raise ValueError(f"{recorded} is of {told['images']} images in batches of {told['rows']}, not of {self.of}")
        for one in told["results"]:
            right = share_interval(round(one["accuracy"] * told["images"]), told["images"])
            given = Result(**{"accuracy_interval": right, "commit": told["commit"]} | one)
            if not given.same_as:
                self.results.setdefault(given.name, given)
        self.held = {one["tier"]: Held(**one) for one in told["held_out"]} | self.held


def draw_finals(
    chosen: Sequence[Contestant],
    share_of: Mapping[str, float],
    final: Final,
    kept: Kept,
    tiers: Mapping[str, Any],
    grouped: int,
) -> None:
    """Every contestant that is not known, and of tiers what tuning predicted beside what came."""
    by_name = {one.name: one for one in chosen}
    for one in track(chosen, "finalists"):
        if one.name in kept.results:
            continue
        if one.same_as:
            kept.results[one.name] = like(one, by_name[one.same_as], kept.results[one.same_as], final.labels[0])
        else:
            images, labels = final.drawn(one.prepare())
            kept.results[one.name] = final.figures(one, images, labels, share_of[one.name])
            if one.who == "tier":
                kept.held[one.settings] = final.held(one.settings, tiers[one.settings], images, grouped)
        kept.write()


def like(one: Contestant, twin: Contestant, known: Result, labels: torch.Tensor) -> Result:
    """The figures of another that draws the same images; ValueError where it does not."""
    mine, theirs = (from_patches(each.prepare()(labels, 5000)) for each in (one, twin))
    apart = float(decibels(mine, theirs).min())
    if apart < ALIKE:
        raise ValueError(f"{one.name} does not draw what {twin.name} draws: {apart:.1f} dB apart")
    return replace(known, who=one.who, settings=one.settings, same_as=twin.name, apart=apart)
