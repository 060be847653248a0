"""How near replayed generations come to the recorded ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edit_compile.calls.generations import CallsError, Generation
from edit_compile.calls.replaying import Replayed

DRAWS = 9_999
"""Samples that an interval is told from."""


@dataclass(frozen=True)
class Mean:
    """A mean over generations, with the bootstrap interval (percentiles) that holds it with 95% confidence."""

    value: float
    low: float
    high: float


def quality(replayed: Replayed, generation: Generation) -> float:
    """PSNR of a replayed result in dB: 20 log10(range / rmse), infinite where it equals the recorded one.

    The range is max - min of what was recorded. Where no result was recorded, what the sampler made of the last call is
    not known: compared are then that call's latents and output, as far as they move, all their numbers together.

    CallsError where `replayed` is another generation's.
    """
    ours, theirs = _compared(replayed, generation)
    if ours.shape != theirs.shape:
        raise CallsError("what was replayed has other shapes than the generation: it is another's")
    error = float((ours - theirs).square().mean().sqrt())
    if error == 0.0:
        return math.inf
    reach = float(theirs.max() - theirs.min())
    return 20 * math.log10(reach / error) if reach > 0 else -math.inf


def mean_quality(decibels: Sequence[float], seed: int = 0) -> Mean:
    """The mean of `quality` over generations; ValueError where there is none. Infinite as soon as one of them is."""
    values = np.asarray(decibels, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError("the mean of no generation: give the decibels of at least one")
    draw = np.random.default_rng(seed)
    means = np.sort([values[draw.integers(values.size, size=values.size)].mean() for _ in range(DRAWS)])
    low, high = (float(means[round(part * (DRAWS - 1))]) for part in (0.025, 0.975))
    return Mean(float(values.mean()), low, high)


def _compared(replayed: Replayed, generation: Generation) -> tuple[Tensor, Tensor]:
    """What of both is compared, float64."""
    if (replayed.result is None) != (generation.result is None) or len(replayed.outputs) != len(generation.calls):
        raise CallsError("what was replayed has other calls than the generation, or a result only one of them has")
    if replayed.result is not None and generation.result is not None:
        return replayed.result.double(), generation.result.double()
    place, last = replayed.place, generation.calls[-1]
    new = replayed.latents[-1], replayed.outputs[-1][place.output]
    old = place.latents_of(last), last.outputs[place.output]
    return torch.cat([place.rows(tensor) for tensor in new]), torch.cat([place.rows(tensor) for tensor in old])
