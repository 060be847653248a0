"""What the example's model is called with; needs no diffusers, so that a bundle can be served without it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from examples.fashion_mnist.data import NO_CLASS

TOKENS, CHANNELS, LABEL_CHANNELS = 49, 16, 16


def image_ids() -> Tensor:
    """Positions of the 49 patches, (49, 3) float32: zero, row, column."""
    ids = torch.zeros(7, 7, 3)
    ids[..., 1] = torch.arange(7)[:, None]
    ids[..., 2] = torch.arange(7)[None]
    return ids.reshape(TOKENS, 3)


def inputs(x: Tensor, t: Tensor, labels: Tensor) -> dict[str, Any]:
    """Keyword arguments of the model's forward.

    x: (B, 49, 16) float32; t: (B,) float32 in [0, 1], 1 is pure noise; labels: (B,) int64 in 0..10, 10 is "no class".
    """
    onehot = nn.functional.one_hot(labels, NO_CLASS + 1).to(x.dtype)
    label = nn.functional.pad(onehot, (0, LABEL_CHANNELS - onehot.shape[1]))
    return {
        "hidden_states": x,
        "encoder_hidden_states": label[:, None],
        "pooled_projections": label,
        "timestep": t,
        "img_ids": image_ids().to(x.device),
        "txt_ids": torch.zeros(1, 3, device=x.device),
        "return_dict": False,
    }
