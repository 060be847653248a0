"""Tiers for the dense model, without training: python -m examples.fashion_mnist.tune --output tuned.edit

Records a few generations, tunes on them, and prints each tier beside sampling with as many steps: dB to the dense
model's own images on generations that were held out, times faster on this machine, and, with --images, accuracy and
Frechet distance of so many images.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

import edit_compile
from edit_compile.files import write_file_atomically
from edit_compile.measuring.machine import commit, describe_machine, summary
from examples.fashion_mnist.data import CLASSES
from examples.fashion_mnist.evaluate import quality
from examples.fashion_mnist.judge import load_judge
from examples.fashion_mnist.model import WEIGHTS, load_model
from examples.fashion_mnist.sample import GUIDANCE, STEPS, sample_patches

FIRST_SEED = 1000


def recorded(
    model: torch.nn.Module, folder: Path, generations: int, rows: int, first_seed: int = FIRST_SEED, steps: int = STEPS
) -> edit_compile.Recording:
    """Generations of `rows` images each, classes in turn."""
    parts = (torch.arange(generations * rows) % len(CLASSES)).split(rows)
    with edit_compile.record(model, folder) as recorder:
        for seed, part in list(enumerate(parts))[recorder.count :]:  # goes on where it stopped
            with recorder.generation():
                recorder.result(sample_patches(model, part, seed=first_seed + seed, steps=steps))
    return edit_compile.Recording(folder)


def judged(compiled: edit_compile.CompiledTransformer, images: int, steps: int) -> tuple[str, str]:
    """Accuracy and Frechet distance of `images` images in words; dashes for none."""
    if not images:
        return "-", "-"
    found = quality(compiled, load_judge(WEIGHTS / "judge.safetensors"), images, GUIDANCE, steps=steps)
    return f"{found.accuracy:.1%}", f"{found.distance:.1f}"


@dataclass(frozen=True)
class Known:
    """What tuning tells of a tier; `decisions` are those of each step, for all blocks."""

    tier: str
    steps_computed: int
    flops_share: float
    times_faster: float
    decibels: float
    interval: tuple[float, float]
    fewer_steps_decibels: float
    decisions: list[float]

    @staticmethod
    def of(tuned: edit_compile.Tuned, name: str) -> Known:
        """Of the tier `name`."""
        tier = tuned.tiers[name]
        assert tier.quality_db and tier.quality_interval and tier.flops_share and tier.times_faster
        fewer, count = tuned.fewer_steps[name].value, tuned.computed_steps[name]
        assert isinstance(tier.policy, edit_compile.ScheduledPolicy)
        assert (tier.policy.table == tier.policy.table[:, :1]).all()
        known = tier.flops_share, tier.times_faster, tier.quality_db, tier.quality_interval
        return Known(name, count, *known, fewer, tier.policy.table[:, 0].tolist())

    def row(self) -> tuple[str, ...]:
        """As text."""
        low, high = self.interval
        return (
            self.tier,
            str(self.steps_computed),
            f"{self.flops_share:.0%}",
            f"{self.times_faster:.2f}",
            f"{self.decibels:.1f} ({low:.1f} to {high:.1f})",
            f"{self.fewer_steps_decibels:.1f}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tuned.edit"))
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--generations", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the sampler that is recorded")
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--results", type=Path, help="write the table's figures as this JSON file")
    parser.add_argument("--plot", type=Path, help="draw quality against time as this image")
    given = parser.parse_args()
    model = load_model("dense")
    with TemporaryDirectory() as folder:
        recording = recorded(model, Path(folder), given.generations, given.rows, steps=given.steps)
        compiled = edit_compile.compile(model, inputs=recording, engine=given.engine)
        tuned = edit_compile.tune(compiled, list(recording), held_out=given.generations - 3)
    tuned.add_to(compiled)
    compiled.save(given.output)
    if given.plot is not None:
        tuned.plot(given.plot)
    headings = "tier", "steps computed", "FLOPs", "times faster", "dB (95%)", "dB, fewer steps", "accuracy", "distance"
    table = Table(*headings)
    table.add_row("dense", str(given.steps), "100%", "1.00", "-", "-", *judged(compiled, given.images, given.steps))
    found = [Known.of(tuned, name) for name in tuned.tiers]
    for one in found:
        compiled.tier = one.tier
        table.add_row(*one.row(), *judged(compiled, given.images, given.steps))
    machine = describe_machine()
    table.caption = f"{given.engine}; {given.images} images; {summary(machine)}"
    Console(width=140).print(table)
    if given.results is not None:
        written = {
            "machine": machine,
            "commit": commit(),
            "engine": given.engine,
            "first_seed": FIRST_SEED,
            "steps": given.steps,
        }
        written |= {"generations": given.generations, "rows": given.rows, "tiers": [asdict(one) for one in found]}
        write_file_atomically(given.results, json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
