"""A small checkpoint in the layout of the authors' release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.zoo import CASES

DIM, HIDDEN, BLOCKS = 48, 16, 2
Weights = dict[str, Tensor]


def qwen() -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of the checkpoint's class, and inputs of a batch of two."""
    case = CASES["QwenImageTransformer2DModel"]()
    return case.model, case.inputs


def router_weights(index: int) -> Weights:
    """One router of the layout, so far from its start that gates and widths differ between inputs."""
    generator = torch.Generator().manual_seed(11 * index)

    def linear(name: str, rows: int, columns: int, scale: float) -> Weights:
        weight = torch.randn(rows, columns, generator=generator) * scale
        return {f"{name}.weight": weight, f"{name}.bias": torch.randn(rows, generator=generator) * 0.1}

    named = (
        linear("img_mod.1", 3 * DIM, DIM, 1.0)
        | linear("out.0", HIDDEN, DIM, 0.5)
        | linear("out.2", 1, HIDDEN, 0.4)
        | linear("width_head", 4, HIDDEN, 1.5)
    )
    return {f"gate_mlps.{index}.{name}": value for name, value in named.items()}


def checkpoint() -> Weights:
    """One state dict: the model's, with MLPs that weigh more than a fresh model's, and its routers'."""
    own = {key: value * (4.0 if "_mlp." in key else 0.9) for key, value in qwen()[0].state_dict().items()}
    routers = [router_weights(index) for index in range(BLOCKS)]
    return own | {key: value for router in routers for key, value in router.items()}


def written(folder: Path) -> Path:
    """The checkpoint as a file in `folder`."""
    path = folder / "model.safetensors"
    save_file(checkpoint(), path)
    return path
