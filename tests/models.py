"""Tiny transformers with random weights, each with the keyword arguments of one forward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode with every parameter drawn anew, so that no zero initialisation hides a fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0))
    return model.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_flux(
    batch: int = 2, side: int = 4, text: int = 6, double: int = 2, single: int = 2, seed: int = 0
) -> tuple[nn.Module, Mapping[str, object]]:
    """FLUX: double- and single-stream blocks, D 128, `side` x `side` image tokens, rotary positions."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    rows = torch.arange(side).repeat_interleave(side)
    columns = torch.arange(side).repeat(side)
    inputs = {
        "hidden_states": noise(batch, side * side, 8),
        "encoder_hidden_states": noise(batch, text, 24, seed=2),
        "pooled_projections": noise(batch, 20, seed=3),
        "timestep": torch.linspace(0.9, 0.4, batch),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).float(),
        "txt_ids": torch.zeros(text, 3),
    }
    return randomised(model, seed), inputs


def tiny_dit(batch: int = 2, side: int = 8, seed: int = 0) -> tuple[nn.Module, Mapping[str, object]]:
    """DiT: one stream, D 64, time and class embedded inside each block; (side / 2)^2 tokens."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        num_layers=3,
        sample_size=side,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "hidden_states": noise(batch, 4, side, side),
        "timestep": torch.linspace(900, 300, batch).long(),
        "class_labels": torch.arange(1, batch + 1) % 10,
    }
    return randomised(model, seed), inputs


def tiny_sd3(batch: int = 2, side: int = 8, text: int = 5, seed: int = 0) -> tuple[nn.Module, Mapping[str, object]]:
    """SD3: joint blocks, D 64; the last one gives no text stream."""
    model = SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=64,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=16,
    )
    inputs = {
        "hidden_states": noise(batch, 4, side, side),
        "encoder_hidden_states": noise(batch, text, 24, seed=2),
        "pooled_projections": noise(batch, 20, seed=3),
        "timestep": torch.linspace(900, 300, batch),
    }
    return randomised(model, seed), inputs
