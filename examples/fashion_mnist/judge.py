"""An independent judge of generated images: a small CNN classifier and the Frechet distance in its features.

Train it with: python -m examples.fashion_mnist.judge --output examples/fashion_mnist/weights/judge.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from edit_compile.files import save_tensors_atomically
from examples.fashion_mnist.data import CLASSES, load_split

FEATURES = 64


class Judge(nn.Module):
    """Classifier of images (B, 28, 28) float32 in [-1, 1]; about 0.2 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.norm2 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv3, self.norm3 = nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128)
        self.hidden = nn.Linear(128 * 9, FEATURES)
        self.head = nn.Linear(FEATURES, len(CLASSES))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (B, 64) float32."""
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(images[:, None]))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.norm3(self.conv3(x))), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10)."""
        return self.head(F.dropout(self.features(images), 0.3, self.training))


def load_judge(path: Path) -> Judge:
    """The trained judge in eval mode."""
    judge = Judge()
    counters = {name: value for name, value in judge.state_dict().items() if not value.is_floating_point()}
    judge.load_state_dict(counters | {name: tensor.float() for name, tensor in load_file(path).items()})
    return judge.eval()


@torch.no_grad()
def judged(judge: Judge, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Predicted classes (N,) int64 and features (N, 64) of images (N, 28, 28) in [-1, 1]."""
    features = torch.cat([judge.features(chunk) for chunk in images.split(batch_size)])
    return judge.head(features).argmax(1), features


Gaussian = tuple[np.ndarray, np.ndarray]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features (N, F), (M, F), each taken as a Gaussian.

    Comparable only at equal N: it is biased upwards for small N.
    """
    return frechet_of_gaussians(gaussian(a), gaussian(b))


def gaussian(features: Tensor) -> Gaussian:
    """Mean (F,) and covariance (F, F) of features (N, F), float64."""
    values = features.double().numpy()
    return values.mean(0), np.cov(values, rowvar=False)


def frechet_of_gaussians(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The root's trace is taken from the eigenvalues of C_a C_b, which are real and not negative: features that never
    fire make it singular, and a matrix root of a singular matrix is not to be trusted.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    difference = mean_a - mean_b
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)).sum()
    return float(difference @ difference + np.trace(cov_a + cov_b) - 2 * root)


def train_judge(epochs: int, seed: int = 0, batch_size: int = 128) -> tuple[Judge, float]:
    """Train on the 60,000 training images (random flips and shifts); returns it with its test accuracy."""
    torch.manual_seed(seed)
    images, labels = load_split("train")
    judge = Judge()
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for epoch in range(epochs):
        judge.train()
        for chosen in torch.randperm(len(images))[: len(images) // batch_size * batch_size].split(batch_size):
            loss = F.cross_entropy(judge(_augmented(_scaled(images[chosen]))), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: test accuracy {test_accuracy(judge):.4f}", flush=True)
    return judge.eval(), test_accuracy(judge)


def test_accuracy(judge: Judge) -> float:
    """Share of the 10,000 test images that the judge classifies as labelled."""
    images, labels = load_split("test")
    return (judged(judge.eval(), _scaled(images))[0] == labels).float().mean().item()


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _augmented(images: Tensor) -> Tensor:
    flipped = torch.where((torch.rand(len(images)) < 0.5)[:, None, None], images.flip(-1), images)
    row, column = torch.randint(-1, 2, (2,)).tolist()
    return F.pad(flipped, (1, 1, 1, 1), value=-1.0)[:, 1 + row : 29 + row, 1 + column : 29 + column]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights" / "judge.safetensors")
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    judge, accuracy = train_judge(arguments.epochs)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.half() for n, t in judge.state_dict().items() if t.is_floating_point()}
    save_tensors_atomically(arguments.output, tensors, {"test_accuracy": f"{accuracy:.4f}"})
    print(f"{arguments.output}: test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
