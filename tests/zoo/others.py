"""Zoo cases of the audio models and of the models of images and videos that stand alone."""

from __future__ import annotations

import torch
from diffusers import (
    AceStepTransformer1DModel,
    CosmosTransformer3DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    LongCatAudioDiTTransformer,
    MiniMaxMusic3Transformer1DModel,
    MotifVideoTransformer3DModel,
    StableAudio3DiTModel,
    StableAudioDiTModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from tests.zoo.registry import Case, case, noise


@case("StableAudioDiTModel")
def stable_audio() -> Case:
    model = StableAudioDiTModel(
        sample_size=20,
        in_channels=8,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=8,
        cross_attention_dim=24,
        time_proj_dim=16,
        global_states_input_dim=40,
        cross_attention_input_dim=18,
    )
    inputs = {
        "hidden_states": noise(2, 8, 20),
        "timestep": torch.tensor([0.9, 0.4]),
        "encoder_hidden_states": noise(2, 7, 18, seed=1),
        "global_hidden_states": noise(2, 1, 40, seed=2),
        "rotary_embedding": get_1d_rotary_pos_embed(6, 21, use_real=True, repeat_interleave_real=False),
    }
    return Case(model, inputs)


@case("StableAudio3DiTModel")
def stable_audio_3() -> Case:
    model = StableAudio3DiTModel(
        io_channels=8,
        embed_dim=48,
        depth=2,
        num_heads=3,
        cond_token_dim=24,
        global_cond_dim=18,
        local_add_cond_dim=9,
        timestep_features_dim=10,
        ff_mult=2.5,
        num_memory_tokens=5,
    )
    inputs = {
        "hidden_states": noise(2, 8, 20),
        "timestep": torch.tensor([0.9, 0.4]),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "global_hidden_states": noise(2, 18, seed=2),
        "encoder_attention_mask": torch.arange(7) < torch.tensor([[7], [4]]),
        "local_add_cond": noise(2, 9, 20, seed=3),
    }
    return Case(model, inputs)


@case("LongCatAudioDiTTransformer")
def longcat_audio() -> Case:
    model = LongCatAudioDiTTransformer(dit_dim=48, dit_depth=2, dit_heads=3, dit_text_dim=24, latent_dim=8, ff_mult=2.5)
    inputs = {
        "hidden_states": noise(2, 20, 8),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "encoder_attention_mask": torch.arange(7) < torch.tensor([[7], [4]]),
        "timestep": torch.tensor([0.9, 0.4]),
        "attention_mask": torch.arange(20) < torch.tensor([[15], [20]]),
        "latent_cond": noise(2, 20, 8, seed=2),
    }
    return Case(model, inputs)


@case("AceStepTransformer1DModel")
def ace_step() -> Case:
    model = AceStepTransformer1DModel(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        in_channels=24,
        audio_acoustic_hidden_dim=9,
        sliding_window=4,
        encoder_hidden_size=20,
    )
    inputs = {
        "hidden_states": noise(2, 22, 9),
        "timestep": torch.tensor([0.9, 0.4]),
        "timestep_r": torch.tensor([0.9, 0.4]),
        "encoder_hidden_states": noise(2, 7, 20, seed=1),
        "context_latents": noise(2, 22, 15, seed=2),
    }
    return Case(model, inputs)


@case("MiniMaxMusic3Transformer1DModel")
def minimax_music_3() -> Case:
    model = MiniMaxMusic3Transformer1DModel(
        in_channels=8,
        condition_dim=24,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=16,
        ff_inner_dim=80,
        rotary_dim=6,
        fourier_embedding_dim=10,
    )
    inputs = {
        "hidden_states": noise(2, 8, 20),
        "timestep": torch.tensor([0.9, 0.4]),
        "encoder_hidden_states": noise(2, 20, 24, seed=1),
    }
    return Case(model, inputs)


@case("JoyImageEditTransformer3DModel")
def joyimage_edit() -> Case:
    model = JoyImageEditTransformer3DModel(
        in_channels=8,
        hidden_size=48,
        num_attention_heads=3,
        text_dim=24,
        mlp_width_ratio=2.5,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    inputs = {
        "hidden_states": noise(2, 3, 8, 1, 4, 6),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
    }
    return Case(model, inputs)


@case("JoyImageEditPlusTransformer3DModel")
def joyimage_edit_plus() -> Case:
    model = JoyImageEditPlusTransformer3DModel(
        in_channels=8,
        hidden_size=48,
        num_attention_heads=3,
        text_dim=24,
        mlp_width_ratio=2.5,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    inputs = {
        "hidden_states": noise(2, 18, 8, 1, 2, 2),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "encoder_hidden_states_mask": (torch.arange(7) < torch.tensor([[7], [4]])).long(),
        "shape_list": [[(1, 3, 4), (1, 3, 2)], [(1, 3, 4), (1, 2, 2)]],
    }
    return Case(model, inputs)


@case("CosmosTransformer3DModel")
def cosmos() -> Case:
    # The padding mask is left out: the model resizes it with torchvision.
    model = CosmosTransformer3DModel(
        in_channels=9,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2.5,
        text_embed_dim=24,
        adaln_lora_dim=10,
        max_size=(8, 16, 16),
        concat_padding_mask=False,
    )
    inputs = {
        "hidden_states": noise(2, 8, 3, 6, 8),
        "timestep": torch.tensor([0.9, 0.4]),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "fps": 16,
        "condition_mask": noise(2, 1, 3, 6, 8, seed=2).gt(0).float(),
    }
    return Case(model, inputs)


@case("MotifVideoTransformer3DModel")
def motif_video() -> Case:
    model = MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=4,
        num_decoder_layers=2,
        mlp_ratio=2.5,
        text_embed_dim=24,
        image_embed_dim=20,
        rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    inputs = {
        "hidden_states": noise(2, 9, 3, 6, 8),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "encoder_attention_mask": torch.arange(7) < torch.tensor([[7], [4]]),
        "image_embeds": noise(2, 5, 20, seed=2),
    }
    return Case(model, inputs)
