"""Zoo cases of the image models with two streams of tokens that become one: FLUX and its relatives."""

from __future__ import annotations

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanImageTransformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor

from tests.zoo.registry import Case, case, noise

HEADS = {"attention_head_dim": 12, "num_attention_heads": 4}
LAYERS = {"num_layers": 2, "num_single_layers": 2}


def grid(rows: int, columns: int, axes: int = 3, first: float = 0.0) -> Tensor:
    """Position ids of an image, with the coordinates at axes 1 and 2."""
    ids = torch.zeros(rows, columns, axes)
    ids[..., 0] = first
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    return ids.flatten(0, 1)


def steps(scale: float = 1.0) -> Tensor:
    return torch.tensor([0.9, 0.4]) * scale


@case("FluxTransformer2DModel")
def flux() -> Case:
    model = FluxTransformer2DModel(
        in_channels=8,
        **LAYERS,
        **HEADS,
        joint_attention_dim=24,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )
    inputs = {
        "hidden_states": noise(2, 20, 8),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "pooled_projections": noise(2, 10, seed=2),
        "timestep": steps(),
        "guidance": torch.tensor([3.5, 4.5]),
        "img_ids": grid(4, 5),
        "txt_ids": torch.zeros(7, 3),
    }
    return Case(model, inputs)


@case("Flux2Transformer2DModel")
def flux2() -> Case:
    model = Flux2Transformer2DModel(
        in_channels=8,
        **LAYERS,
        **HEADS,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        mlp_ratio=2.5,
        axes_dims_rope=(4, 4, 2, 2),
    )
    text = torch.zeros(7, 4)
    text[:, 3] = torch.arange(7)
    inputs = {
        "hidden_states": noise(2, 20, 8),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": steps(),
        "guidance": torch.tensor([3.5, 4.5]),
        "img_ids": grid(4, 5, axes=4).repeat(2, 1, 1),
        "txt_ids": text.repeat(2, 1, 1),
    }
    return Case(model, inputs)


@case("Flux3Transformer2DModel")
def flux3() -> Case:
    model = Flux3Transformer2DModel(
        in_channels=8,
        cond_in_channels=10,
        **LAYERS,
        **HEADS,
        joint_attention_dim=24,
        timestep_channels=16,
        mlp_ratio=2.5,
        axes_dims_rope=(4, 4, 2, 2),
    )
    text = torch.zeros(7, 4)
    text[:, 3] = torch.arange(7)
    inputs = {
        "hidden_states": noise(2, 20, 8),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": steps(),
        "img_ids": grid(4, 5, axes=4),
        "txt_ids": text,
        "image_cond_hidden_states": noise(2, 15, 10, seed=2),
        "image_cond_ids": grid(3, 5, axes=4, first=10.0),
    }
    return Case(model, inputs)


@case("ChromaTransformer2DModel")
def chroma() -> Case:
    model = ChromaTransformer2DModel(
        in_channels=8,
        **LAYERS,
        **HEADS,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=40,
        approximator_layers=2,
    )
    mask = torch.ones(2, 27)
    mask[1, 4:7] = 0
    inputs = {
        "hidden_states": noise(2, 20, 8),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": steps(),
        "img_ids": grid(4, 5),
        "txt_ids": torch.zeros(7, 3),
        "attention_mask": mask,
    }
    return Case(model, inputs)


@case("BriaTransformer2DModel")
def bria() -> Case:
    model = BriaTransformer2DModel(in_channels=8, **LAYERS, **HEADS, joint_attention_dim=24, axes_dims_rope=[4, 4, 4])
    inputs = {
        "hidden_states": noise(2, 20, 8),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": steps(1000),
        "img_ids": grid(4, 5),
        "txt_ids": torch.zeros(7, 3),
    }
    return Case(model, inputs)


@case("BriaFiboTransformer2DModel")
def bria_fibo() -> Case:
    model = BriaFiboTransformer2DModel(
        in_channels=8, **LAYERS, **HEADS, joint_attention_dim=28, axes_dims_rope=[4, 4, 4], text_encoder_dim=14
    )
    inputs = {
        "hidden_states": noise(2, 20, 8),
        "encoder_hidden_states": noise(2, 7, 28, seed=1),
        "text_encoder_layers": [noise(2, 7, 14, seed=seed) for seed in range(2, 6)],
        "timestep": steps(1000),
        "img_ids": grid(4, 5),
        "txt_ids": torch.zeros(7, 3),
    }
    return Case(model, inputs)


@case("LongCatImageTransformer2DModel")
def longcat_image() -> Case:
    model = LongCatImageTransformer2DModel(
        in_channels=8, **LAYERS, **HEADS, joint_attention_dim=24, pooled_projection_dim=24, axes_dims_rope=[4, 4, 4]
    )
    inputs = {
        "hidden_states": noise(2, 20, 8),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": steps(),
        "img_ids": grid(4, 5, first=1.0) + torch.tensor([0.0, 7.0, 7.0]),
        "txt_ids": torch.arange(7.0)[:, None] * torch.tensor([0.0, 1.0, 1.0]),
    }
    return Case(model, inputs)


@case("OvisImageTransformer2DModel")
def ovis_image() -> Case:
    model = OvisImageTransformer2DModel(
        in_channels=8, out_channels=8, **LAYERS, **HEADS, joint_attention_dim=24, axes_dims_rope=(4, 4, 4)
    )
    inputs = {
        "hidden_states": noise(2, 20, 8),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": steps(),
        "img_ids": grid(4, 5),
        "txt_ids": torch.arange(7.0)[:, None] * torch.tensor([0.0, 1.0, 1.0]),
    }
    return Case(model, inputs)


@case("HunyuanImageTransformer2DModel")
def hunyuan_image() -> Case:
    model = HunyuanImageTransformer2DModel(
        in_channels=6,
        out_channels=6,
        **LAYERS,
        **HEADS,
        num_refiner_layers=2,
        guidance_embeds=True,
        text_embed_dim=24,
        text_embed_2_dim=14,  # its projection has 2048 hidden channels whatever the config: 4 M of the parameters
        rope_axes_dim=(6, 6),
        use_meanflow=True,
    )
    mask, glyph_mask = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    mask[1, 4:] = 0
    glyph_mask[0, 5:] = 0
    inputs = {
        "hidden_states": noise(2, 6, 4, 5),
        "timestep": steps(1000),
        "timestep_r": steps(800),
        "guidance": torch.tensor([3500.0, 4500.0]),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": noise(2, 9, 14, seed=2),
        "encoder_attention_mask_2": glyph_mask,
    }
    return Case(model, inputs)


@case("SD3Transformer2DModel")
def sd3() -> Case:
    model = SD3Transformer2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=6,
        num_layers=5,
        **HEADS,
        joint_attention_dim=24,
        caption_projection_dim=48,
        pooled_projection_dim=10,
        pos_embed_max_size=11,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "pooled_projections": noise(2, 10, seed=2),
        "timestep": steps(1000),
    }
    return Case(model, inputs)


@case("AuraFlowTransformer2DModel")
def aura_flow() -> Case:
    model = AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=6,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        **HEADS,
        joint_attention_dim=24,
        caption_projection_dim=48,
        pos_embed_max_size=121,
    )
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": steps(),
    }
    return Case(model, inputs)
