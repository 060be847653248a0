"""Write the bundle that is served: the dense model with its tiers. python -m examples.serve.bundle demo/served.edit"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

import edit_compile
from examples.fashion_mnist.data import CLASSES, NO_CLASS
from examples.fashion_mnist.model import CHANNELS, TOKENS, inputs, load_model

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "tuned.json"


def write_bundle(path: Path, engine: str | None = None) -> None:
    """The dense model, compiled for any number of images, with the tiers of benchmarks/results/tuned.json."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS, CHANNELS, generator=generator)
    example = inputs(x, torch.tensor([0.3, 0.7]), torch.tensor([len(CLASSES) - 1, NO_CLASS]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no routers")
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch copying its own pytree specs
        compiled = edit_compile.compile(load_model("dense"), inputs=example, engine=engine)
    add_tiers(compiled)
    compiled.save(path)


def add_tiers(compiled: edit_compile.CompiledTransformer) -> None:
    """The tiers that `examples.fashion_mnist.tune` found, for 28 steps, and "every third", for any number of steps."""
    recorded, blocks = json.loads(RESULTS.read_text()), len(compiled.program.manifest.blocks)
    for one in recorded["tiers"]:
        table = np.repeat(np.array(one["decisions"])[:, None], blocks, 1)
        compiled.add_tier(
            one["tier"],
            edit_compile.ScheduledPolicy(table, routed=False),
            quality_db=one["decibels"],
            quality_interval=one["interval"],
            times_faster=one["times_faster"],
            flops_share=one["flops_share"],
            steps=recorded["steps"],
            machine=recorded["machine"]["cpu"],
        )
    compiled.add_tier("every third", edit_compile.ReusePolicy(2, warmup_steps=1, order=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    write_bundle(given.output)
    sys.stdout.write(f"{given.output}\n")


if __name__ == "__main__":
    main()
