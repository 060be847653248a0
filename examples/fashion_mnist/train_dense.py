"""Train the dense model: python -m examples.fashion_mnist.train_dense --output runs/dense --steps 3000."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from edit_compile.training.train import TrainConfig, train
from examples.fashion_mnist.model import load_model
from examples.fashion_mnist.task import DenseTask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/dense"))
    parser.add_argument("--start", help="weights to begin with: 'dense' or a checkpoint; default: new ones")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--decay-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
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
        decay_steps=arguments.decay_steps,
        compile=arguments.compile,
    )
    print(train(DenseTask(load_model(arguments.start) if arguments.start else None), config))


if __name__ == "__main__":
    main()
