"""Zoo cases of the video models that are not of the Wan family: CogVideoX, Hunyuan, LTX and their relatives."""

from __future__ import annotations

import torch
from diffusers import (
    AllegroTransformer3DModel,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
    EasyAnimateTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from torch import Tensor

from tests.zoo.registry import Case, case, noise

STEPS = torch.tensor([900.0, 400.0])


def mask(*lengths: int, size: int = 7) -> Tensor:
    """One row per length: that many ones, then zeros."""
    return (torch.arange(size) < torch.tensor(lengths)[:, None]).long()


@case("CogVideoXTransformer3DModel")
def cogvideox() -> Case:
    model = CogVideoXTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=8,
        out_channels=8,
        time_embed_dim=20,
        text_embed_dim=24,
        num_layers=2,
        sample_width=10,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )
    inputs = {
        "hidden_states": noise(2, 3, 8, 4, 10),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": STEPS.long(),
        "image_rotary_emb": get_1d_rotary_pos_embed(16, 30, use_real=True),
    }
    return Case(model, inputs)


@case("ConsisIDTransformer3DModel")
def consisid() -> Case:
    model = ConsisIDTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=8,
        out_channels=8,
        time_embed_dim=20,
        text_embed_dim=24,
        num_layers=4,
        sample_width=10,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=2,
        cross_attn_dim_head=12,
        cross_attn_num_heads=3,
        LFE_id_dim=14,
        LFE_vit_dim=40,
        LFE_depth=4,
        LFE_dim_head=8,
        LFE_num_heads=3,
        LFE_num_id_token=5,
        LFE_num_querie=6,
        LFE_output_dim=32,
        LFE_num_scale=4,
    )
    inputs = {
        "hidden_states": noise(2, 3, 8, 4, 10),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": STEPS.long(),
        "image_rotary_emb": get_1d_rotary_pos_embed(16, 30, use_real=True),
        "id_cond": noise(2, 14, seed=2),
        "id_vit_hidden": [noise(2, 11, 40, seed=3 + scale) for scale in range(4)],
    }
    return Case(model, inputs)


@case("AllegroTransformer3DModel")
def allegro() -> Case:
    model = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=6,
        sample_width=10,
        sample_frames=4,
        caption_channels=20,
    )
    *frequencies, frames, rows, columns = get_3d_rotary_pos_embed_allegro(
        24, ((0, 0), (3, 5)), (3, 5), 4, (2.2, 2.0, 2.0)
    )
    positions = torch.cartesian_prod(frames.long(), rows.long(), columns.long()).T[:, None]
    inputs = {
        "hidden_states": noise(2, 8, 4, 6, 10),
        "encoder_hidden_states": noise(2, 7, 20, seed=1),
        "encoder_attention_mask": mask(7, 5),
        "timestep": STEPS,
        "image_rotary_emb": (tuple(frequencies), tuple(positions)),
    }
    return Case(model, inputs)


@case("MochiTransformer3DModel")
def mochi() -> Case:
    # three blocks, since the last one leaves its text as it is
    model = MochiTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=36,
        in_channels=6,
        text_embed_dim=40,
        time_embed_dim=20,
        max_sequence_length=7,
    )
    inputs = {
        "hidden_states": noise(2, 6, 3, 4, 10),
        "encoder_hidden_states": noise(2, 7, 40, seed=1),
        "timestep": STEPS,
        "encoder_attention_mask": mask(7, 5).bool(),
    }
    return Case(model, inputs)


@case("LTXVideoTransformer3DModel")
def ltx() -> Case:
    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        num_layers=2,
        caption_channels=20,
    )
    inputs = {
        "hidden_states": noise(2, 30, 8),
        "encoder_hidden_states": noise(2, 7, 20, seed=1),
        "timestep": STEPS,
        "encoder_attention_mask": mask(7, 5),
        "num_frames": 3,
        "height": 2,
        "width": 5,
        "rope_interpolation_scale": (0.32, 32.0, 32.0),
    }
    return Case(model, inputs)


@case("LTX2VideoTransformer3DModel")
def ltx2() -> Case:
    model = LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        gated_attn=True,
        cross_attn_mod=True,
        audio_in_channels=6,
        audio_out_channels=6,
        audio_num_attention_heads=4,
        audio_attention_head_dim=10,
        audio_cross_attention_dim=40,
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
        num_layers=2,
        caption_channels=20,
        perturbed_attn=True,
    )
    inputs = {
        "hidden_states": noise(2, 30, 8),
        "audio_hidden_states": noise(2, 9, 6, seed=1),
        "encoder_hidden_states": noise(2, 7, 20, seed=2),
        "audio_encoder_hidden_states": noise(2, 7, 20, seed=3),
        "timestep": STEPS,
        "sigma": STEPS,
        "encoder_attention_mask": mask(7, 5),
        "audio_encoder_attention_mask": mask(7, 5),
        "num_frames": 3,
        "height": 2,
        "width": 5,
        "fps": 24.0,
        "audio_num_frames": 9,
        "use_cross_timestep": True,
    }
    return Case(model, inputs)


HUNYUAN = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "patch_size": 2,
    "text_embed_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}


def hunyuan_inputs(frames: int) -> dict[str, Tensor]:
    return {
        "hidden_states": noise(2, 8, frames, 4, 10),
        "timestep": STEPS,
        "encoder_hidden_states": noise(2, 7, 20, seed=1),
        "encoder_attention_mask": mask(7, 5),
    }


@case("HunyuanVideoTransformer3DModel")
def hunyuan() -> Case:
    model = HunyuanVideoTransformer3DModel(num_single_layers=2, pooled_projection_dim=14, **HUNYUAN)
    inputs = {
        "pooled_projections": noise(2, 14, seed=2),
        "guidance": torch.tensor([6000.0, 4000.0]),
    }
    return Case(model, hunyuan_inputs(3) | inputs)


@case("HunyuanVideo15Transformer3DModel")
def hunyuan15() -> Case:
    # the projection of the second text embedding has 2048 channels whatever the configuration
    model = HunyuanVideo15Transformer3DModel(text_embed_2_dim=18, image_embed_dim=22, **HUNYUAN)
    inputs = {
        "encoder_hidden_states_2": noise(2, 6, 18, seed=2),
        "encoder_attention_mask_2": mask(4, 6, size=6),
        "image_embeds": noise(2, 5, 22, seed=3),
    }
    return Case(model, hunyuan_inputs(3) | inputs)


@case("HunyuanVideoFramepackTransformer3DModel")
def framepack() -> Case:
    model = HunyuanVideoFramepackTransformer3DModel(
        num_single_layers=2,
        pooled_projection_dim=14,
        has_image_proj=True,
        image_proj_dim=22,
        has_clean_x_embedder=True,
        **HUNYUAN,
    )
    inputs = {
        "pooled_projections": noise(2, 14, seed=2),
        "image_embeds": noise(2, 5, 22, seed=3),
        "indices_latents": torch.arange(3) + 15,
        "guidance": torch.tensor([6000.0, 4000.0]),
        "latents_clean": noise(2, 8, 3, 4, 10, seed=4),
        "indices_latents_clean": torch.arange(3) + 12,
        "latents_history_2x": noise(2, 8, 4, 4, 10, seed=5),
        "indices_latents_history_2x": torch.arange(4) + 8,
        "latents_history_4x": noise(2, 8, 8, 4, 10, seed=6),
        "indices_latents_history_4x": torch.arange(8),
    }
    return Case(model, hunyuan_inputs(3) | inputs)


@case("EasyAnimateTransformer3DModel")
def easyanimate() -> Case:
    model = EasyAnimateTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=8,
        out_channels=8,
        patch_size=2,
        num_layers=4,
        mmdit_layers=2,
        time_embed_dim=20,
        text_embed_dim=24,
    )
    inputs = {
        "hidden_states": noise(2, 8, 3, 4, 10),
        "timestep": STEPS,
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
    }
    return Case(model, inputs)
