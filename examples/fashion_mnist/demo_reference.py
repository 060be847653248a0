"""The judge's features of real images as a Gaussian, kept in the repository so that the demo needs no data set.

Made anew whenever the judge is: python -m examples.fashion_mnist.demo_reference
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from edit_compile.files import save_tensors_atomically
from examples.fashion_mnist.data import load_split
from examples.fashion_mnist.judge import Judge, frechet_of_gaussians, gaussian, judged, load_judge
from examples.fashion_mnist.model import WEIGHTS

PATH = WEIGHTS / "reference.safetensors"
COUNTS = (50, 100, 200, 300, 500, 1000)


@dataclass(frozen=True)
class Reference:
    """Mean (F,) and covariance (F, F) of the judge's features of the test images, float64.

    `floors` gives the distance of that many real training images to them: what a perfect model would reach.
    `accuracy` is the share of test images that the judge gets right.
    """

    mean: Tensor
    covariance: Tensor
    floors: dict[int, float]
    accuracy: float

    def distance(self, features: Tensor) -> float:
        """Frechet distance of features (N, F); comparable only at equal N."""
        return frechet_of_gaussians(gaussian(features), (self.mean.numpy(), self.covariance.numpy()))


def load_reference(path: Path = PATH) -> Reference:
    """What `main` wrote."""
    with safe_open(path, framework="pt") as file:
        mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
        told = file.metadata()
    floors = {count: float(told[f"floor_{count}"]) for count in COUNTS if f"floor_{count}" in told}
    return Reference(mean, covariance, floors, float(told["accuracy"]))


def make_reference(judge: Judge) -> Reference:
    """From the data set itself."""
    images, labels = load_split("test")
    predicted, features = judged(judge, _scaled(images))
    mean, covariance = (torch.from_numpy(array) for array in gaussian(features))
    accuracy = (predicted == labels).double().mean().item()
    training, _ = load_split("train")
    chosen = training[torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[: max(COUNTS)]]
    real = judged(judge, _scaled(chosen))[1]
    bare = Reference(mean, covariance, {}, accuracy)
    return Reference(mean, covariance, {count: bare.distance(real[:count]) for count in COUNTS}, accuracy)


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def main() -> None:
    found = make_reference(load_judge(WEIGHTS / "judge.safetensors"))
    told = {f"floor_{count}": f"{value:.4f}" for count, value in found.floors.items()}
    tensors = {"mean": found.mean, "covariance": found.covariance}
    save_tensors_atomically(PATH, tensors, {**told, "accuracy": f"{found.accuracy:.4f}"})
    print(f"{PATH}: judge's test accuracy {found.accuracy:.4f}, distances of real images {found.floors}")


if __name__ == "__main__":
    main()
