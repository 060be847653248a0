"""Distil the elastic model from the dense one: python -m examples.fashion_mnist.distil --output runs/distilled

Records generations of the dense model, puts hidden channels in order, and trains all weights with routers so that
a sampler of --steps steps ends where the dense model's 28 ended. Goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

import edit_compile
from edit_compile.elastic.transformer import ElasticTransformer
from edit_compile.training.distil import distil
from edit_compile.training.distil_task import Distillation
from edit_compile.training.train import TrainConfig
from examples.fashion_mnist.model import elastic_model, load_model
from examples.fashion_mnist.sample import STEPS
from examples.fashion_mnist.tune import recorded


def taught(
    elastic: ElasticTransformer,
    recording: edit_compile.Recording,
    output: Path,
    steps: int,
    budget: float,
    train_steps: int,
    lr: float = 5e-4,
    seed: int = 0,
) -> None:
    """Train all of `elastic` to lead a sampler of `steps` steps, within `budget` of a call's FLOPs; `output` is the
    run's folder."""
    config = TrainConfig(
        output=output,
        steps=train_steps,
        batch_size=1,
        lr=lr,
        warmup_steps=50,
        decay_steps=train_steps // 2,
        weight_decay=0.0,
        ema_decay=0.995,
        seed=seed,
        lr_multipliers=(("routers.", 5.0),),
    )
    policy = edit_compile.RoutingPolicy(margin=0.0, max_reuse=0)
    settings = Distillation(rollout=1, stride=STEPS // steps, narrowing=0.1, quiet=0.2)
    distil(elastic, recording, budget, config, train="all", policy=policy, settings=settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/distilled"))
    parser.add_argument("--dense", default="dense")
    parser.add_argument("--generations", type=int, default=60, help="that are recorded")
    parser.add_argument("--rows", type=int, default=32, help="images in each")
    parser.add_argument("--steps", type=int, default=7, help="of the sampler that is taught; divides 28")
    parser.add_argument("--budget", type=float, default=0.45, help="share of the dense FLOPs of a call")
    parser.add_argument("--train-steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    if given.threads:
        torch.set_num_threads(given.threads)
    model = load_model(given.dense)
    recording = recorded(model, given.output / "calls", given.generations, given.rows, first_seed=100_000)
    edit_compile.order_channels(model, [recording[0], recording[1]])
    elastic = elastic_model(model)
    taught(elastic, recording, given.output, given.steps, given.budget, given.train_steps, given.lr)
    elastic.save_pretrained(given.output / "elastic")
    print(given.output / "elastic")


if __name__ == "__main__":
    main()
