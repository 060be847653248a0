"""What widths cost the dense model, as it is and ordered: python -m examples.fashion_mnist.width_curve prints a table.

Minutes, most of them for making the held-out generations again at every width.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from edit_compile.calls.generations import Generation, Recording
from edit_compile.calls.recorder import record
from edit_compile.calls.replaying import replay
from edit_compile.calls.result_quality import Mean, mean_quality, quality
from edit_compile.calls.sampler import Sampler
from edit_compile.measuring.machine import describe_machine, summary
from edit_compile.widths.channel_order import order_channels
from examples.fashion_mnist.data import CLASSES, to_patches
from examples.fashion_mnist.model import load_model
from examples.fashion_mnist.sample import sample
from passes.pipeline import analyse
from passes.program.check import masked
from passes.program.compilation import Compilation

WIDTHS = (0.75, 0.5, 0.25)
ROWS = (("as trained", False, False), ("ordered", True, False), ("ordered and centred", True, True))
BATCH = 8


def record_generations(model: nn.Module, folder: Path, count: int, steps: int) -> Recording:
    """`count` generations of BATCH images, of all classes in turn."""
    with record(model, folder) as recorder:
        for seed in range(count):
            labels = torch.arange(BATCH * seed, BATCH * (seed + 1)) % len(CLASSES)
            with recorder.generation():
                recorder.result(to_patches(sample(model, labels, steps=steps, seed=seed)))
    return Recording(folder)


def qualities(model: nn.Module, generations: Sequence[Generation], widths: Sequence[float] = WIDTHS) -> list[Mean]:
    """Decibels of whole generations with all blocks at each of `widths`, against those recorded."""
    found = analyse(model, generations[0].calls[0].arguments)
    pairs = [(generation, Sampler.fit(generation)) for generation in generations]
    means = []
    for width in widths:
        with at_width(model, found, width):
            means.append(mean_quality([quality(replay(model, one, sampler), one) for one, sampler in pairs]))
    return means


@contextmanager
def at_width(model: nn.Module, found: Compilation, width: float) -> Iterator[None]:
    """Inside the ``with`` block all MLPs of `model` see their first channels alone, as when it is compiled."""
    with ExitStack() as masks:
        for index, block in enumerate(found.discovery.blocks):
            sites = found.groups[found.group_of[index]].sites
            masks.enter_context(masked(model.get_submodule(block.name), sites, width))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=8, help="to order by")
    parser.add_argument("--held-out", type=int, default=8, help="to measure on")
    parser.add_argument("--steps", type=int, default=28)
    given = parser.parse_args()
    table = Table("channels", *(f"dB at width {width:g}" for width in WIDTHS))
    with tempfile.TemporaryDirectory() as folder:
        recording = record_generations(
            load_model("dense"), Path(folder), given.generations + given.held_out, given.steps
        )
        chosen = [recording[number] for number in range(given.generations)]
        held_out = [recording[number] for number in range(given.generations, len(recording))]
        for name, ordered, centre in (
            ("as trained", False, False),
            ("ordered", True, False),
            ("ordered and centred", True, True),
        ):
            model = load_model("dense")
            if ordered:
                order_channels(model, chosen, centre=centre)
            row = qualities(model, held_out)
            table.add_row(name, *(f"{mean.value:.1f} ({mean.low:.1f} to {mean.high:.1f})" for mean in row))
    table.caption = f"{given.held_out} generations of {BATCH} images; {summary(describe_machine())}"
    Console().print(table)


if __name__ == "__main__":
    main()
