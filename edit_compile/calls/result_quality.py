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

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over generations, and the interval in which that of as many others lies with 95% confidence."""

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


def mean_quality(decibels: Sequence[float]) -> Mean:
    """The mean of `quality` over generations, and value -+ t s sqrt(2 / n) (Student's t, n - 1 degrees of freedom).

    Of one generation, or where some are infinite and others not, nothing bounds the interval. ValueError for none.
    """
    from scipy.stats import t

    values = np.asarray(decibels, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError("the mean of no generation: give the decibels of at least one")
    mean, count = float(values.mean()), len(values)
    if count > 1 and (values == values[0]).all():
        return Mean(mean, mean, mean)
    if count == 1 or not np.isfinite(values).all():
        return Mean(mean, -math.inf, math.inf)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, count - 1) * values.std(ddof=1)) * math.sqrt(2 / count)
    return Mean(mean, mean - reach, mean + reach)


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
