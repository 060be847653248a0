"""Train the elastic model from the dense one: python -m examples.fashion_mnist.train_elastic --output runs/elastic."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import torch

from edit_compile.training.losses import PRESETS, Budget
from edit_compile.training.train import TrainConfig, train
from examples.fashion_mnist.model import load_model
from examples.fashion_mnist.task import ElasticTask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/elastic"))
    parser.add_argument("--dense", default="dense", help="'dense', or a checkpoint of the dense training")
    parser.add_argument("--budget", choices=sorted(PRESETS), default="flux")
    parser.add_argument("--budget-weight", type=float, default=2.0, help="lambda")
    parser.add_argument("--times", choices=("uniform", "logit-normal"), default="uniform")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--decay-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--router-lr", type=float, default=2.0, help="factor on the routers' learning rate")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = TrainConfig(
        output=arguments.output,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        warmup_steps=200,
        decay_steps=arguments.decay_steps,
        compile=arguments.compile,
        lr_multipliers=(("routers.", arguments.router_lr),),
    )
    budget = replace(Budget.preset(arguments.budget), weight=arguments.budget_weight)
    task = ElasticTask(load_model(arguments.dense), budget, uniform_times=arguments.times == "uniform")
    last = train(task, config)
    load_model(str(last)).save_pretrained(arguments.output / "elastic")
    print(last)


if __name__ == "__main__":
    main()
