"""Tiny transformers with random weights, each with the keyword arguments of one forward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F


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


class PlainBlock(nn.Module):
    """Self-attention, cross-attention and a SwiGLU, modulated by a vector; called by position."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulate = nn.Linear(dim, 4 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.cross_out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, 6 * dim)
        self.down = nn.Linear(3 * dim, dim)

    def forward(self, x: Tensor, text: Tensor, vector: Tensor, mask: Tensor | None = None) -> Tensor:
        shift, scale, gate, gate_mlp = self.modulate(F.silu(vector))[:, None].chunk(4, dim=-1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).chunk(3, dim=-1)
        x = x + gate * self.out(self._attend(q, k, v))
        k, v = self.key_value(text).chunk(2, dim=-1)
        x = x + self.cross_out(self._attend(self.query(x), k, v, mask))
        a, b = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + gate_mlp * self.down(F.silu(a) * b)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        mask = None if mask is None else mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class PlainDiT(nn.Module):
    """A transformer that no library knows: odd argument names, blocks called by position."""

    def __init__(
        self, dim: int = 32, heads: int = 2, depth: int = 3, channels: int = 4, block: type = PlainBlock
    ) -> None:
        super().__init__()
        self.dim = dim
        self.embed = nn.Linear(channels, dim)
        self.text = nn.Linear(12, dim)
        self.clock = nn.Linear(dim, dim)
        self.layers = nn.ModuleList(block(dim, heads) for _ in range(depth))
        self.head = nn.Linear(dim, channels)

    def forward(self, x: Tensor, t: Tensor, words: Tensor, mask: Tensor | None = None) -> Tensor:
        rates = torch.exp(-torch.arange(self.dim // 2, device=x.device) / 3)
        angles = t[:, None].float() * rates
        vector = self.clock(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        x, words = self.embed(x), self.text(words)
        for layer in self.layers:
            x = layer(x, words, vector, mask)
        return self.head(x)


def tiny_plain(
    batch: int = 2, tokens: int = 9, words: int = 5, seed: int = 0
) -> tuple[nn.Module, Mapping[str, object]]:
    """PlainDiT: one stream, D 32, called with tokens, times, words and a mask over the words."""
    mask = torch.ones(batch, words, dtype=torch.bool)
    mask[0, -1] = False
    inputs = {
        "x": noise(batch, tokens, 4),
        "t": torch.linspace(0.9, 0.3, batch),
        "words": noise(batch, words, 12, seed=2),
        "mask": mask,
    }
    return randomised(PlainDiT(), seed), inputs


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
