"""Trials of all settings on a few images, and the choice of those that go into the final."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

from edit_compile.files import write_file_atomically
from edit_compile.measuring.machine import commit, describe_machine
from examples.fashion_mnist.contestant import Contestant, Draw
from examples.fashion_mnist.data import from_patches
from examples.fashion_mnist.finals import decibels
from examples.fashion_mnist.model import load_model
from examples.fashion_mnist.sample import FEW_STEPS, STEPS, sample_patches
from passes.graphs.cost import counting

SHARES = (0.5, 0.36, 0.25, 0.15)
"""Of the dense FLOPs."""
ROOMY = 0.75
"""A share within which nearly every rival has something."""
SLACK = 0.01


@dataclass(frozen=True)
class Work:
    """FLOPs of a batch: 28 dense steps, and the routers of one call of the elastic model."""

    whole: int
    routers: float

    @classmethod
    def of(cls, dense: nn.Module, elastic: nn.Module, labels: Tensor) -> Work:
        """Counted on eager models, of which the elastic one computes everything, masked, besides its routers."""
        few, routed = (flops_of(partial(_drawn, model, FEW_STEPS), labels) for model in (dense, elastic))
        whole = flops_of(partial(_drawn, dense, STEPS), labels)
        return cls(whole, (routed - few) / (2 * FEW_STEPS))

    @classmethod
    def counted(cls, labels: Tensor) -> Work:
        """Of the example's models."""
        return cls.of(load_model("dense"), load_model("elastic"), labels)

    @property
    def routers_share(self) -> float:
        """Of all routers of a call, in the FLOPs of a dense call."""
        return self.routers * 2 * STEPS / self.whole

    def share(self, contestant: Contestant, draw: Draw, labels: Tensor) -> float:
        """Of the 28 dense steps' FLOPs, routers among them; compiled models count their own work."""
        compiled = contestant.compiled
        if compiled is None:
            return flops_of(draw, labels) / self.whole
        compiled.reset_counters()
        draw(labels, 0)
        counted, routed = compiled.counters, bool(compiled.program.routers) and compiled.policy.routed
        return (counted.flops + (counted.calls * self.routers if routed else 0)) / self.whole


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


def _drawn(model: nn.Module, steps: int, labels: Tensor, seed: int) -> Tensor:
    return sample_patches(model, labels, steps=steps, seed=seed)


def tried(contestant: Contestant, labels: Tensor, dense: Sequence[Tensor], work: Work) -> Tried:
    """What a setting gives on batches whose dense images are known; the first is drawn twice, caches begin anew."""
    draw = contestant.prepare()
    draw(labels, 0)
    share = work.share(contestant, draw, labels)
    found = [decibels(from_patches(draw(labels, seed)), target) for seed, target in enumerate(dense)]
    return Tried(contestant, share, float(torch.cat(found).mean()))


def trials(
    contestants: Iterable[Contestant], labels: Tensor, dense: Sequence[Tensor], work: Work, path: Path
) -> list[Tried]:
    """All settings, tried once and kept in the file `path`, for the same images alone."""
    of = f"{len(labels)} rows, {len(dense)} batches, {float(dense[0].double().sum()):.3f}"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    commits = [one for one in kept.get("commit", "").split(", ") if one]
    taken = {"machine": describe_machine(), "commit": ", ".join(dict.fromkeys([*commits, commit()]))}
    known: dict[str, tuple[float, float]] = kept.get(of, {})
    found = []
    for one in track(list(contestants), "rivals' settings"):
        name = one.name
        if name not in known:
            made = tried(one, labels, dense, work)
            known[name] = made.flops_share, made.decibels
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file_atomically(path, json.dumps(taken | {of: known}, indent=1) + "\n")
        found.append(Tried(one, *known[name]))
    return found


def forget(path: Path, who: str) -> None:
    """Leave out of the trials in `path` those by whose name begins so."""
    if path.is_file():
        told = json.loads(path.read_text())
        for known in told.values():
            if isinstance(known, dict):
                for name in [name for name in known if name.startswith(who)]:
                    del known[name]
        write_file_atomically(path, json.dumps(told, indent=1) + "\n")


def best_of(tries: Sequence[Tried], share: float, whos: Iterable[str] | None = None) -> Iterator[Tried]:
    """Of each rival, or of `whos`, what is best within a share of FLOPs, if anything is."""
    for who in dict.fromkeys(one.contestant.who for one in tries) if whos is None else whos:
        within = [one for one in tries if one.contestant.who == who and one.flops_share <= share + SLACK]
        if within:
            yield max(within, key=lambda one: one.decibels)


def told_of(at: float, one: Tried) -> dict[str, object]:
    """As results hold it."""
    settings = {"who": one.contestant.who, "settings": one.contestant.settings}
    return {"at": at, **settings, "flops_share": one.flops_share, "decibels": one.decibels}


def chosen_of(
    tries: Sequence[Tried], compiled: Iterable[Contestant], work: Work, leaders: int, drawn: Collection[str] = ()
) -> list[tuple[float, Contestant, float]]:
    """(share of FLOPs at most, who, share): those that go into the final.

    At each share the best `leaders` rivals, and those of the others that are `drawn` already; of rivals that are not
    among these the best one within half of the FLOPs, or within what it takes; and all that is `compiled`, fewer steps
    among them.
    """
    chosen: list[tuple[float, Contestant, float]] = []
    for at in SHARES:
        rivals = [one for one in best_of(tries, at) if one.contestant.who != "fewer steps"]
        for place, one in enumerate(sorted(rivals, key=lambda one: -one.decibels)):
            if place < leaders or one.contestant.name in drawn:
                chosen.append((at, one.contestant, one.flops_share))
    for who in dict.fromkeys(one.contestant.who for one in tries):
        if who != "fewer steps" and who not in {one.who for _, one, _ in chosen}:
            at, own = next((at, own) for at in (SHARES[0], ROOMY, 1.0) for own in best_of(tries, at, [who]))
            chosen.append((at, own.contestant, own.flops_share))
    labels = torch.arange(8) % 10
    for one in compiled:
        share = work.share(one, one.prepare(), labels)
        chosen.append((min(at for at in (1.0, *SHARES) if at >= share - SLACK), one, share))
    return chosen
