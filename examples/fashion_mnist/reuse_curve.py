"""What reuse saves and costs: python -m examples.fashion_mnist.reuse_curve BUNDLE prints a row per margin and K.

BUNDLE is the elastic bundle that the demo writes (demo/elastic.edit); minutes per row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from edit_compile.measuring.machine import describe_machine, summary
from examples.fashion_mnist.demo_measure import draw, flops_left, judge_images
from examples.fashion_mnist.demo_reference import load_reference
from examples.fashion_mnist.judge import load_judge
from examples.fashion_mnist.model import WEIGHTS
from runtime.face.load import load
from runtime.requests.trace import REUSED
from runtime.routing.policy import RoutingPolicy

SETTINGS = ((0.0, 0), (0.02, 1), (0.02, 3), (0.1, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--images", type=int, default=200)
    given = parser.parse_args()
    judge, reference = load_judge(WEIGHTS / "judge.safetensors"), load_reference()
    table = Table("margin", "K", "accuracy", "distance", "FLOPs left", "reused", "open gates p, 10% / 50% / 90%")
    for margin, max_reuse in SETTINGS:
        model = load(given.bundle, engine=given.engine, policy=RoutingPolicy(margin=margin, max_reuse=max_reuse))
        accuracy, distance = judge_images(draw(model, given.images, lambda *_: None), judge, reference)
        columns = model.trace[-1].arrays()
        gates = columns["p"][columns["p"] >= 0.5]
        table.add_row(
            f"{margin:g}",
            str(max_reuse),
            f"{accuracy:.1%}",
            f"{distance:.1f}",
            f"{flops_left(model):.0%}",
            f"{(columns['done'] == REUSED).mean():.0%}",
            " / ".join(f"{q:.3f}" for q in np.quantile(gates, (0.1, 0.5, 0.9))),
        )
    table.caption = f"{given.images} images; {summary(describe_machine())}"
    Console().print(table)


if __name__ == "__main__":
    main()
