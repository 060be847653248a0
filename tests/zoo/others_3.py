"""Zoo cases of the SANA models of video."""

from __future__ import annotations

import torch
from diffusers import SanaVideoTransformer3DModel, SanaWMLTX2RefinerTransformer3DModel, SanaWMTransformer3DModel

from tests.zoo.registry import Case, case, noise


@case("SanaVideoTransformer3DModel")
def sana_video() -> Case:
    model = SanaVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=3,
        cross_attention_head_dim=16,
        cross_attention_dim=48,
        caption_channels=24,
        rope_max_seq_len=32,
    )
    inputs = {
        "hidden_states": noise(2, 8, 3, 4, 10),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_attention_mask": (torch.arange(7) < torch.tensor([[7], [4]])).long(),
    }
    return Case(model, inputs)


@case("SanaWMTransformer3DModel")
def sana_wm() -> Case:
    model = SanaWMTransformer3DModel(
        in_channels=8,
        num_layers=4,
        hidden_size=48,
        num_attention_heads=4,
        softmax_every_n=2,
        linear_head_dim=16,
        conv_kernel_size=2,
        chunk_plucker_channels=9,
        caption_channels=24,
        mlp_ratio=2.5,
    )
    # Poses of cameras from camera to world, then focal lengths and centre in cells of the latent grid.
    poses = torch.zeros(2, 3, 4, 4)
    poses[..., :3, :3] = torch.linalg.qr(noise(2, 3, 3, 3, seed=3)).Q
    poses[..., :3, 3] = noise(2, 3, 3, seed=4)
    poses[..., 3, 3] = 1.0
    lens = torch.tensor([6.0, 5.0, 2.5, 2.0]).expand(2, 3, 4)
    inputs = {
        "hidden_states": noise(2, 8, 3, 4, 5),
        "timestep": torch.tensor([[[0.0, 900.0, 900.0]], [[0.0, 400.0, 400.0]]]),
        "encoder_hidden_states": noise(2, 1, 7, 24, seed=1),
        "mask": (torch.arange(7) < torch.tensor([[7], [4]])).long(),
        "camera_conditions": torch.cat([poses.flatten(2), lens], dim=-1),
        "chunk_plucker": noise(2, 9, 3, 4, 5, seed=2),
    }
    return Case(model, inputs)


@case("SanaWMLTX2RefinerTransformer3DModel")
def sana_wm_refiner() -> Case:
    # Without the cache of keys and values of earlier windows: it is an object of its own class, not data.
    model = SanaWMLTX2RefinerTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        audio_in_channels=10,
        audio_out_channels=10,
        audio_num_attention_heads=2,
        audio_attention_head_dim=18,
        audio_cross_attention_dim=36,
        num_layers=2,
        caption_channels=24,
    )
    rotary = model.build_rotary_emb_for_absolute_positions(2, [2, 3, 4], 2, 3, torch.device("cpu"), fps=16.0)
    inputs = {
        "hidden_states": noise(2, 18, 8),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": torch.tensor([[900.0], [400.0]]).repeat(1, 18),
        "video_rotary_emb": rotary,
        "encoder_attention_mask": (torch.arange(7) < torch.tensor([[7], [4]])).long(),
    }
    return Case(model, inputs)
