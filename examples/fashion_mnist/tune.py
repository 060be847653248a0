"""Tiers for the dense model, without training: python -m examples.fashion_mnist.tune --output tuned.edit

Records a few generations, tunes on them, and prints each tier beside sampling with as many steps: dB to the dense
model's own images on generations that were held out, times faster on this machine, and, with --images, accuracy and
Frechet distance of so many images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

import edit_compile
from edit_compile.measuring.machine import describe_machine, summary
from examples.fashion_mnist.data import CLASSES
from examples.fashion_mnist.evaluate import quality
from examples.fashion_mnist.judge import load_judge
from examples.fashion_mnist.model import WEIGHTS, load_model
from examples.fashion_mnist.sample import GUIDANCE, STEPS, sample_patches


def recorded(
    model: torch.nn.Module, folder: Path, generations: int, rows: int, first_seed: int = 1000
) -> edit_compile.Recording:
    """Generations of `rows` images each, classes in turn."""
    parts = (torch.arange(generations * rows) % len(CLASSES)).split(rows)
    with edit_compile.record(model, folder) as recorder:
        for seed, part in list(enumerate(parts))[recorder.count :]:  # goes on where it stopped
            with recorder.generation():
                recorder.result(sample_patches(model, part, seed=first_seed + seed))
    return edit_compile.Recording(folder)


def judged(compiled: edit_compile.CompiledTransformer, images: int) -> tuple[str, str]:
    """Accuracy and Frechet distance of `images` images in words; dashes for none."""
    if not images:
        return "-", "-"
    found = quality(compiled, load_judge(WEIGHTS / "judge.safetensors"), images, GUIDANCE)
    return f"{found.accuracy:.1%}", f"{found.distance:.1f}"


def known(tuned: edit_compile.Tuned, name: str) -> tuple[str, ...]:
    """What tuning tells of a tier."""
    tier = tuned.tiers[name]
    assert tier.quality_interval is not None
    low, high = tier.quality_interval
    return (
        str(tuned.computed_steps[name]),
        f"{tier.flops_share:.0%}",
        f"{tier.times_faster:.2f}",
        f"{tier.quality_db:.1f} ({low:.1f} to {high:.1f})",
        f"{tuned.fewer_steps[name].value:.1f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tuned.edit"))
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--generations", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="draw quality against time as this image")
    given = parser.parse_args()
    model = load_model("dense")
    with TemporaryDirectory() as folder:
        recording = recorded(model, Path(folder), given.generations, given.rows)
        compiled = edit_compile.compile(model, inputs=recording, engine=given.engine)
        tuned = edit_compile.tune(compiled, list(recording), held_out=given.generations - 3)
    tuned.add_to(compiled)
    compiled.save(given.output)
    if given.plot is not None:
        tuned.plot(given.plot)
    headings = "tier", "steps computed", "FLOPs", "times faster", "dB (95%)", "dB, fewer steps", "accuracy", "distance"
    table = Table(*headings)
    table.add_row("dense", str(STEPS), "100%", "1.00", "-", "-", *judged(compiled, given.images))
    for compiled.tier in tuned.tiers:
        name = compiled.tier or ""
        table.add_row(name, *known(tuned, name), *judged(compiled, given.images))
    table.caption = f"{given.engine}; {given.images} images; {summary(describe_machine())}"
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
