"""Compile the trained models, load the bundles in a fresh process, draw the ten classes.

python -m examples.fashion_mnist.demo prints one table and writes demo/report.html, which holds everything it shows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console

import edit_compile
from examples.fashion_mnist.data import CLASSES, NO_CLASS
from examples.fashion_mnist.demo_measure import VARIANTS
from examples.fashion_mnist.demo_reference import PATH as REFERENCE
from examples.fashion_mnist.demo_report import table_of, tier_table, write_report
from examples.fashion_mnist.model import CHANNELS, TOKENS, WEIGHTS, inputs, load_model

NEEDED = ("dense.safetensors", "elastic", "judge.safetensors", REFERENCE.name)

console = Console()


def compile_models(folder: Path) -> None:
    """Write the bundles of the dense and of the elastic model into `folder`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS, CHANNELS, generator=generator)
    example = inputs(x, torch.tensor([0.3, 0.7]), torch.tensor([len(CLASSES) - 1, NO_CLASS]))
    for name in sorted(file.removesuffix(".edit") for file in VARIANTS.values()):
        with console.status(f"compiling the {name} model"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has no routers")
            warnings.filterwarnings("ignore", category=FutureWarning)  # torch copying its own pytree specs
            edit_compile.compile(load_model(name), inputs=example, output=folder / f"{name}.edit")
        console.print(f"compiled the {name} model to {folder / name}.edit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--engine", help="default: the fastest here")
    parser.add_argument("--images", type=int, default=100, help="images per row that are judged")
    parser.add_argument("--repeats", type=int, default=2, help="timed samplings")
    given = parser.parse_args()
    missing = [name for name in NEEDED if not (WEIGHTS / name).exists()]
    if missing:
        sys.exit(f"{WEIGHTS} lacks {', '.join(missing)}: see examples/fashion_mnist/README.md for how they are made")
    console.print("This takes some two minutes on two cores.")
    given.output.mkdir(parents=True, exist_ok=True)
    compile_models(given.output)
    options = ["--images", str(given.images), "--repeats", str(given.repeats)]
    options += ["--engine", given.engine] if given.engine else []
    command = [sys.executable, "-m", "examples.fashion_mnist.demo_measure", str(given.output), *options]
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    results = json.loads((given.output / "results.json").read_text())
    console.print(table_of(results))
    console.print(tier_table(results))
    console.print(f"report: {write_report(results, given.output)}")


if __name__ == "__main__":
    main()
