"""The order of one MLP's hidden channels, of what was measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_compile.widths.channel_statistics import Moments, importance
from edit_compile.widths.hidden_channels import HiddenChannels
from passes.mlp.weights import site_rows
from runtime.base.errors import EditError


class OrderError(EditError, ValueError):
    """The channels of a model cannot be ordered; the message says why, and the model is as it was."""


@dataclass(frozen=True)
class OrderedMlp:
    """What became of one MLP of H hidden channels.

    `name` is that of its (first) down-projection. Channel i is what channel `order[i]` was, (H,) int64; `importance` is
    that of the channels as they now are, (H,) float64. `reason` says why they stayed where they were, None where they
    were ordered; then `importance` falls.
    """

    name: str
    order: Tensor
    importance: Tensor
    reason: str | None = None

    def kept(self, width: float) -> tuple[float, float]:
        """Share of the importance that the leading part `width` of the channels has: as they were, and as they are."""
        count, total = site_rows(len(self.order), width), float(self.importance.sum()) or 1.0
        before = self.importance[torch.argsort(self.order)]
        return float(before[:count].sum()) / total, float(self.importance[:count].sum()) / total


def ordered_mlp(mlp: HiddenChannels, moments: Sequence[Moments]) -> OrderedMlp:
    """The order that the moments of the MLP's contractions ask for; OrderError where they are not finite."""
    unseen = not any(own.count for own in moments)
    if mlp.reason is not None or unseen:
        zeros = torch.zeros(mlp.size, dtype=torch.float64)
        return OrderedMlp(mlp.name, torch.arange(mlp.size), zeros, mlp.reason or "no recorded call reached it")
    measured = importance(mlp, moments)
    if not torch.isfinite(measured).all():
        raise OrderError(f"model: what enters {mlp.name} in the recorded calls is NaN, infinite or too large")
    order = torch.argsort(measured, descending=True, stable=True)
    return OrderedMlp(mlp.name, order, measured[order])
