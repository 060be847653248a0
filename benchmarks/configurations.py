"""FLUX.1-dev and Qwen-Image at their published sizes, and smaller ones of the same make: models, inputs of one call.

Weights are random: what is measured is how fast a model runs, not what it paints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

DEVIATION = 0.02
"""Standard deviation of every parameter: no zero initialisation hides a fault, and nothing overflows."""


@dataclass(frozen=True)
class Place:
    """Where a model's tensors are and in which dtype; None: torch's default."""

    device: torch.device
    dtype: torch.dtype | None = None


Inputs = Callable[["Configuration", Place], dict[str, Any]]


@dataclass(frozen=True)
class Configuration:
    """A model of diffusers and the shapes of a call.

    `config` holds what differs from the class's defaults, `side` the image's tokens along a side (the VAE divides by 8,
    patches by 2), `text` those of the prompt. `depth` names the fields of the configuration that count blocks; `gate`,
    `width` and `steps` are those of the preset of that name in the paper.
    """

    title: str
    kind: str
    config: Mapping[str, Any]
    inputs_of: Inputs
    depth: tuple[str, ...]
    preset: str
    gate: float
    width: float
    steps: int
    text: int
    side: int = 64

    def bare(self) -> nn.Module:
        """The model on the meta device."""
        with torch.device("meta"):
            return self._made().eval()

    def model(self, place: Place, seed: int = 0) -> nn.Module:
        """The model in eval mode with random parameters, which are made where they stay."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):  # tables that are neither parameters nor buffers are real
            made = self._made()
        draw = torch.Generator(place.device).manual_seed(seed)
        for module in made.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    real = torch.empty(parameter.shape, dtype=place.dtype or parameter.dtype, device=place.device)
                    real.normal_(0, DEVIATION, generator=draw)
                    module._parameters[name] = nn.Parameter(real, requires_grad=False)
        return made.to(place.device).eval()

    def inputs(self, place: Place) -> dict[str, Any]:
        """Keyword arguments of one call, one image."""
        return self.inputs_of(self, place)

    def shallow(self, blocks: int | None) -> Configuration:
        """With at most `blocks` blocks of each kind; as it is where None."""
        if blocks is None:
            return self
        cut = {name: min(blocks, self.value(name)) for name in self.depth}
        return replace(self, config={**self.config, **cut})

    def value(self, name: str) -> Any:
        """A field of the model's configuration."""
        import inspect

        import diffusers

        defaults = inspect.signature(getattr(diffusers, self.kind).__init__).parameters
        return self.config.get(name, defaults[name].default)

    def _made(self) -> nn.Module:
        import diffusers

        model: nn.Module = getattr(diffusers, self.kind)(**self.config)
        return model


def flux_inputs(shape: Configuration, place: Place) -> dict[str, Any]:
    """The keyword arguments of FluxTransformer2DModel, as its pipeline gives them."""
    noise, rest = _noise(place), partial(torch.full, device=place.device)
    return {
        "hidden_states": noise(1, shape.side**2, shape.value("in_channels")),
        "encoder_hidden_states": noise(1, shape.text, shape.value("joint_attention_dim")),
        "pooled_projections": noise(1, shape.value("pooled_projection_dim")),
        "timestep": rest((1,), 1.0, dtype=place.dtype),
        "guidance": rest((1,), 3.5),
        "img_ids": _grid(shape.side, place),
        "txt_ids": rest((shape.text, 3), 0.0),
    }


def qwen_image_inputs(shape: Configuration, place: Place) -> dict[str, Any]:
    """The keyword arguments of QwenImageTransformer2DModel, as its pipeline gives them."""
    noise = _noise(place)
    return {
        "hidden_states": noise(1, shape.side**2, shape.value("in_channels")),
        "encoder_hidden_states": noise(1, shape.text, shape.value("joint_attention_dim")),
        "encoder_hidden_states_mask": torch.ones(1, shape.text, dtype=torch.bool, device=place.device),
        "timestep": torch.full((1,), 1.0, dtype=place.dtype, device=place.device),
        "img_shapes": [[(1, shape.side, shape.side)]],
    }


def _noise(place: Place) -> Callable[..., Tensor]:
    """Draws normal tensors where `place` says."""
    if place.device.type == "meta":
        return partial(torch.empty, dtype=place.dtype, device="meta")
    draw = torch.Generator(place.device).manual_seed(1)
    return partial(torch.randn, generator=draw, dtype=place.dtype, device=place.device)


def _grid(side: int, place: Place) -> Tensor:
    """Positions (side * side, 3) of an image's tokens: 0, row, column."""
    rows, columns = torch.meshgrid(*2 * [torch.arange(side, device=place.device)], indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


_SMALL_FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (16, 8, 8),
    "guidance_embeds": True,
}
_SMALL_QWEN = {
    "in_channels": 8,
    "out_channels": 2,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 4),
}
_MID_FLUX = {
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "axes_dims_rope": (16, 56, 56),
    "guidance_embeds": True,
}

FLUX = Configuration(
    title="FLUX.1-dev",
    kind="FluxTransformer2DModel",
    config={"guidance_embeds": True},
    inputs_of=flux_inputs,
    depth=("num_layers", "num_single_layers"),
    preset="flux",
    gate=0.50,
    width=0.60,
    steps=28,
    text=512,
)
QWEN_IMAGE = Configuration(
    title="Qwen-Image",
    kind="QwenImageTransformer2DModel",
    config={},
    inputs_of=qwen_image_inputs,
    depth=("num_layers",),
    preset="qwen-image-base",
    gate=0.60,
    width=0.65,
    steps=30,
    text=256,
)
FLUX_MID = replace(FLUX, title="flux-mid", config=_MID_FLUX, text=128, side=16)
"""A third of FLUX's width and a fifth of its depth, at 256 x 256: where waiting for decisions dominates."""

FULL = {"flux-mid": FLUX_MID, "flux": FLUX, "qwen-image": QWEN_IMAGE}
SMALL = {
    "flux": replace(FLUX, title="FLUX, tiny", config=_SMALL_FLUX, text=8, side=4),
    "qwen-image": replace(QWEN_IMAGE, title="Qwen-Image, tiny", config=_SMALL_QWEN, text=7, side=4),
}
"""Toys with every part of the two models, which show that the code runs and nothing more."""
