"""What a manifest says of a model beside its blocks."""

from __future__ import annotations

import torch
from torch import nn


def dtype_of(model: nn.Module) -> torch.dtype:
    """What the model computes in: diffusers knows (some parameters may be kept wider), else its first parameter's."""
    own = getattr(model, "dtype", None)
    return own if isinstance(own, torch.dtype) else next(p.dtype for p in model.parameters() if p.is_floating_point())


def config_of(model: nn.Module) -> dict[str, object]:
    """The model's diffusers config without its private entries; empty for other models."""
    return {k: v for k, v in dict(getattr(model, "config", {})).items() if not k.startswith("_")}


def attributes_of(model: nn.Module) -> dict[str, bool | int | float | str | None]:
    """The model's own plain attributes: not those of every module, nor private ones."""
    own = vars(model).keys() - vars(nn.Module()).keys()
    plain = {name: getattr(model, name) for name in sorted(own) if not name.startswith("_")}
    return {name: value for name, value in plain.items() if isinstance(value, (bool, int, float, str))}
