"""How far apart two rows are, image by image, and what decisions go with."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap, rankdata, spearmanr
from torch import Tensor

import edit_compile
from edit_compile.measuring.benchmarking import row_flops
from examples.fashion_mnist.data import NO_CLASS
from examples.fashion_mnist.finals import RESAMPLED, Final, decibels
from examples.fashion_mnist.judge import frechet_of_gaussians, gaussian, judged
from examples.fashion_mnist.model import CHANNELS, TOKENS, inputs

Interval = tuple[float, float]


def differences(final: Final, one: Tensor, other: Tensor) -> dict[str, Any]:
    """dB and distance of images `one` less those of `other`, of the same noise, with intervals over the images."""
    moved = (decibels(one, final.target) - decibels(other, final.target)).numpy()
    known = bootstrap((moved,), np.mean, n_resamples=2000, random_state=0).confidence_interval if moved.any() else None
    features = [judged(final.judge, images.clamp(-1, 1))[1] for images in (one, other)]
    own, others = (np.array(_resampled(final, each)) for each in features)
    whole = [frechet_of_gaussians(gaussian(each), final.real) for each in features]
    found = own - others
    low, high = np.percentile(found - found.mean() + whole[0] - whole[1], (2.5, 97.5))
    return {
        "decibels": float(moved.mean()),
        "decibels_interval": (0.0, 0.0) if known is None else (float(known.low), float(known.high)),
        "distance": whole[0] - whole[1],
        "distance_interval": (float(low), float(high)),
    }


def _resampled(final: Final, features: Tensor) -> list[float]:
    """Distances of features drawn again, the same images of any row."""
    drawn = np.random.default_rng(0).integers(0, len(features), (RESAMPLED, len(features)))
    return [frechet_of_gaussians(gaussian(features[torch.from_numpy(rows)]), final.real) for rows in drawn]


def edges(images: Tensor) -> np.ndarray:
    """Mean absolute difference of neighbouring pixels (B,)."""
    down, across = images.diff(dim=1).abs().mean((1, 2)), images.diff(dim=2).abs().mean((1, 2))
    return ((down + across) / 2).numpy()


def packed(images: Tensor) -> np.ndarray:
    """Bytes of each image (B,), packed by zlib at 8 bits."""
    grey = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    return np.array([len(zlib.compress(one.tobytes(), 9)) for one in grey])


def spent(elastic: edit_compile.CompiledTransformer, decisions: np.ndarray) -> np.ndarray:
    """FLOPs (steps, rows) of decisions (steps, blocks, rows), of the blocks alone."""
    manifest = elastic.program.manifest
    costs = row_flops(manifest, inputs(torch.zeros(1, TOKENS, CHANNELS), torch.ones(1), torch.tensor([NO_CLASS])))
    found = np.zeros((decisions.shape[0], decisions.shape[2]))
    used, plans = {plan for plan, _ in costs}, {plan.id: plan for plan in manifest.plans}
    for index, block in enumerate(manifest.blocks):
        plan = plans[block.plan_among(used) or block.plan]
        for variant, one in enumerate(plan.variants):
            found += costs[plan.id, variant] * np.isclose(decisions[:, index], one.width)
    return found


def correlations(
    elastic: edit_compile.CompiledTransformer,
    seen: Mapping[int, Mapping[str, np.ndarray]],
    dense: Tensor,
    labels: Tensor,
) -> dict[str, Any]:
    """Spearman's of what is computed for an image, at equal timesteps, and what is in the dense model's image of the
    same noise: over all images, and within classes (ranks taken in each class)."""
    flops = np.concatenate([sum(spent(elastic, one) for one in seen[seed].values()) for seed in sorted(seen)], 1)
    found: dict[str, Any] = {"images": flops.shape[1], "spread": float(flops.sum(0).std() / flops.sum(0).mean())}
    for name, measure in (("edges", edges(dense)), ("packed bytes", packed(dense))):
        found[name] = {
            "of all steps": _correlation(flops.sum(0), measure),
            "within classes": _correlation(_in_classes(flops.sum(0), labels), _in_classes(measure, labels)),
            "by step": [_correlation(step, measure)["rho"] for step in flops],
        }
    return found


def _in_classes(values: np.ndarray, labels: Tensor) -> np.ndarray:
    ranks = np.zeros(len(values))
    for label in labels.unique():
        mine = (labels == label).numpy()
        ranks[mine] = rankdata(values[mine]) / mine.sum()
    return ranks


def _correlation(spent_on: np.ndarray, measure: np.ndarray) -> dict[str, Any]:
    if not spent_on.std():
        return {"rho": None, "interval": None}
    known = bootstrap(
        (spent_on, measure), lambda a, b: spearmanr(a, b).statistic, paired=True, vectorized=False,
        n_resamples=1000, method="percentile", random_state=0,
    ).confidence_interval  # fmt: skip
    return {"rho": float(spearmanr(spent_on, measure).statistic), "interval": (float(known.low), float(known.high))}
