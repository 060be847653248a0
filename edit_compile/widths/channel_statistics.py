"""Means and variances of hidden channels over recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edit_compile.widths.hidden_channels import Contracted, HiddenChannels
from passes.graphs.record import here


class Moments:
    """Mean and variance of each of H channels, of all that was added; float64 on the CPU."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self._deviation = torch.zeros(size, dtype=torch.float64)

    @property
    def variance(self) -> Tensor:
        """(H,); zero where nothing was added."""
        return self._deviation / max(self.count, 1)

    def add(self, rows: Tensor) -> None:
        """Add numbers (N, H) of the channels; Chan, Golub and LeVeque's update, since sums of squares cancel."""
        count = len(rows)
        if not count:
            return
        variance, mean = torch.var_mean(rows.float(), dim=0, correction=0)
        moved = mean.to("cpu", torch.float64) - self.mean
        total = self.count + count
        self._deviation += variance.to("cpu", torch.float64) * count + moved.square() * (self.count * count / total)
        self.mean += moved * (count / total)
        self.count = total


@contextmanager
def watched(mlps: Sequence[HiddenChannels]) -> Iterator[list[list[Moments]]]:
    """Inside the ``with`` block, calls in this thread add to the moments of the contractions of each MLP, in order.

    Those that have to stay as they are have none.
    """
    moments = [[Moments(mlp.size) for _ in mlp.contracted if mlp.reason is None] for mlp in mlps]
    handles = [
        place.module.register_forward_pre_hook(here(_adding(place, own)))
        for mlp, all_of_it in zip(mlps, moments, strict=True)
        for place, own in zip(mlp.contracted, all_of_it, strict=False)
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def importance(mlp: HiddenChannels, moments: Sequence[Moments]) -> Tensor:
    """Of each channel the squared error that its mean in its place makes, (H,) float64.

    FLAP's measure (An et al., Fluctuation-based adaptive structured pruning, 2023): the channel's variance times the
    squared norm of its column in the down-projection, summed over the down-projections that contract it.
    """
    return torch.stack(
        [own.variance * place.lengths() for place, own in zip(mlp.contracted, moments, strict=True)]
    ).sum(0)


def means(
    mlps: Sequence[HiddenChannels], moments: Sequence[Sequence[Moments]], orders: Sequence[Tensor]
) -> dict[nn.Module, Tensor]:
    """The mean of what enters each down-projection, (in_features,) float64, in the new orders; zero for others."""
    found: dict[nn.Module, Tensor] = {}
    for mlp, all_of_it, order in zip(mlps, moments, orders, strict=True):
        for place, own in zip(mlp.contracted, all_of_it, strict=False):
            part = place.part
            whole = found.setdefault(place.module, torch.zeros(part.weight.shape[part.dim], dtype=torch.float64))
            whole[part.start : part.start + part.size] = own.mean[order]
    return found


def _adding(place: Contracted, moments: Moments) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        moments.add(place.rows(args[0].detach()))

    return hook
