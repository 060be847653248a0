"""The finalists' figures: quality on many images, with intervals, and what tuning predicted of tiers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest, bootstrap
from torch import Tensor

from edit_compile.files import save_tensors_atomically
from edit_compile.measuring.machine import commit
from examples.fashion_mnist.contestant import Contestant, Draw
from examples.fashion_mnist.data import CLASSES, from_patches
from examples.fashion_mnist.evaluate import test_features
from examples.fashion_mnist.judge import Gaussian, frechet_of_gaussians, gaussian, judged, load_judge
from examples.fashion_mnist.model import WEIGHTS, load_model
from examples.fashion_mnist.sample import sample_patches
from runtime.bundle.tiers import Tier
from runtime.routing.policy import Decider

RESAMPLED = 200
Interval = tuple[float, float]


@dataclass(frozen=True)
class Result:
    """A finalist at one share of FLOPs; intervals of 95%. `times_faster` is against the dense model in eager mode.

    `commit` is of the run that drew the images. Of one that draws the same images as another, `same_as`, quality is
    taken from there, and `apart` is the PSNR of a batch of its own to one of the other's.
    """

    who: str
    settings: str
    at: float
    flops_share: float
    times_faster: float
    decibels: float
    decibels_interval: Interval
    distance: float
    distance_interval: Interval
    accuracy: float
    accuracy_interval: Interval
    commit: str
    same_as: str = ""
    apart: float | None = None

    @property
    def name(self) -> str:
        """As the contestant's."""
        return f"{self.who}: {self.settings}"


@dataclass(frozen=True)
class Held:
    """A tier's predicted dB per generation, with the interval that the mean of as many others should lie in; the mean
    of all batches, and the share of means of `grouped` batches that do lie in it."""

    tier: str
    predicted: float
    interval: Interval
    found: float
    grouped: int
    within: float


def decibels(found: Tensor, dense: Tensor) -> Tensor:
    """PSNR (B,) of images of range 2."""
    return 10 * torch.log10(4 / (found - dense).flatten(1).square().mean(1).clamp(min=1e-20))


def generation_decibels(found: Tensor, dense: Tensor) -> float:
    """PSNR of a batch as one, against the range of the dense one: what `edit_compile.quality` gives."""
    error = (found - dense).double().square().mean()
    return float(10 * torch.log10((dense.max() - dense.min()).double() ** 2 / error))


def share_interval(count: int, of: int) -> Interval:
    """In which a share lies (Wilson)."""
    known = binomtest(count, of).proportion_ci(method="wilson")
    return float(known.low), float(known.high)


class Final:
    """Finalists on many images, in batches of `rows`; what the dense model draws is kept in the file `kept`."""

    def __init__(self, dense: str, images: int, rows: int, kept: Path | None = None) -> None:
        self.dense = load_model(dense)
        self.judge = load_judge(WEIGHTS / "judge.safetensors")
        self.labels = (torch.arange(images) % len(CLASSES)).split(rows)
        self._kept = kept

    def draw_dense(self, labels: Tensor, seed: int) -> Tensor:
        """The dense model's own."""
        return sample_patches(self.dense, labels, seed=seed)

    @cached_property
    def real(self) -> Gaussian:
        """The judge's features of the test images."""
        return gaussian(test_features(self.judge))

    @cached_property
    def target(self) -> Tensor:
        """The dense model's own images (N, 28, 28)."""
        kept = self._kept
        if kept is not None and kept.exists():
            found = load_file(kept)["images"]
            if len(found) == sum(map(len, self.labels)):
                return found
        images, _ = self.drawn(self.draw_dense)
        if kept is not None:
            save_tensors_atomically(kept, {"images": images.contiguous()}, {"commit": commit()})
        return images

    def drawn(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """All images, and whether each is taken for what was asked for, by features of the judge."""
        images = torch.cat([from_patches(draw(part, 5000 + seed)) for seed, part in enumerate(self.labels)])
        return images, torch.cat(list(self.labels))

    def figures(self, contestant: Contestant, images: Tensor, labels: Tensor, share: float) -> Result:
        """Of images (N, 28, 28) that were asked to be of classes `labels` (N,)."""
        predicted, features = judged(self.judge, images.clamp(-1, 1))
        own = decibels(images, self.target).numpy()
        known = bootstrap((own,), np.mean, n_resamples=2000, random_state=0).confidence_interval
        return Result(
            who=contestant.who,
            settings=contestant.settings,
            at=1.0,
            flops_share=share,
            times_faster=1.0,
            decibels=float(own.mean()),
            decibels_interval=(float(known.low), float(known.high)),
            distance=frechet_of_gaussians(gaussian(features), self.real),
            distance_interval=self._distances(features),
            accuracy=float((predicted == labels).float().mean()),
            accuracy_interval=share_interval(int((predicted == labels).sum()), len(labels)),
            commit=commit(),
        )

    def held(self, name: str, tier: Tier[Decider], images: Tensor, grouped: int) -> Held:
        """What tuning predicted of a tier, and what batches that it never saw give, by the measure it predicts."""
        sizes = [len(part) for part in self.labels]
        pairs = zip(images.split(sizes), self.target.split(sizes), strict=True)
        found = np.array([generation_decibels(own, dense) for own, dense in pairs])
        assert tier.quality_interval is not None and tier.quality_db is not None
        low, high = tier.quality_interval
        means = found[: len(found) // grouped * grouped].reshape(-1, grouped).mean(1)
        within = float(((means >= low) & (means <= high)).mean())
        return Held(name, tier.quality_db, (low, high), float(found.mean()), grouped, within)

    def _distances(self, features: Tensor) -> Interval:
        """The distance grows with what is drawn twice, so the interval is moved back by how much it does."""
        drawn = np.random.default_rng(0).integers(0, len(features), (RESAMPLED, len(features)))
        found = np.array(
            [frechet_of_gaussians(gaussian(features[torch.from_numpy(rows)]), self.real) for rows in drawn]
        )
        shift = found.mean() - frechet_of_gaussians(gaussian(features), self.real)
        low, high = np.percentile(found - shift, (2.5, 97.5))
        return float(low), float(high)
