"""Zoo cases of the CogView family, and of the transformers of priors, U-Nets, audio and early video."""

from __future__ import annotations

import torch
from diffusers import (
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    GlmImageTransformer2DModel,
    LatteTransformer3DModel,
    PriorTransformer,
    T5FilmDecoder,
    Transformer2DModel,
    TransformerTemporalModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d_dreamlite import DreamLiteTransformer2DModel
from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0

from tests.zoo.classic import HEADS, padded, steps
from tests.zoo.registry import Case, case, noise

SIZES = {
    "target_size": torch.tensor([[64.0, 80.0], [48.0, 96.0]]),
    "crop_coords": torch.tensor([[0.0, 0.0], [8.0, 4.0]]),
}


@case("GlmImageTransformer2DModel")
def glm_image() -> Case:
    model = GlmImageTransformer2DModel(
        **HEADS,
        in_channels=6,
        out_channels=6,
        num_layers=2,
        text_embed_dim=24,
        time_embed_dim=40,
        condition_dim=14,
        prior_vq_quantizer_codebook_size=50,
    )
    dropped = torch.zeros(2, 20, dtype=torch.bool)
    dropped[1] = True
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "prior_token_id": torch.arange(40).reshape(2, 20),
        "prior_token_drop": dropped,
        "timestep": steps(),
        **SIZES,
    }
    return Case(model, inputs)


@case("CogView3PlusTransformer2DModel")
def cogview3_plus() -> Case:
    model = CogView3PlusTransformer2DModel(
        **HEADS,
        in_channels=6,
        out_channels=10,
        num_layers=2,
        text_embed_dim=24,
        time_embed_dim=40,
        condition_dim=14,
        pos_embed_max_size=8,
    )
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": steps(),
        "original_size": torch.tensor([[64.0, 80.0], [72.0, 88.0]]),
        **SIZES,
    }
    return Case(model, inputs)


@case("CogView4Transformer2DModel")
def cogview4() -> Case:
    model = CogView4Transformer2DModel(
        **HEADS,
        in_channels=6,
        out_channels=6,
        num_layers=2,
        text_embed_dim=24,
        time_embed_dim=40,
        condition_dim=14,
        rope_axes_dim=(16, 16),
    )
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": steps(),
        "original_size": torch.tensor([[64.0, 80.0], [72.0, 88.0]]),
        **SIZES,
    }
    return Case(model, inputs)


@case("PriorTransformer")
def prior() -> Case:
    model = PriorTransformer(**HEADS, num_layers=2, embedding_dim=24, num_embeddings=7)
    inputs = {
        "hidden_states": noise(2, 24),
        "timestep": steps(),
        "proj_embedding": noise(2, 24, seed=1),
        "encoder_hidden_states": noise(2, 7, 24, seed=2),
        "attention_mask": padded(torch.bool),
    }
    return Case(model, inputs)


@case("DreamLiteTransformer2DModel")
def dreamlite() -> Case:
    model = DreamLiteTransformer2DModel(
        **HEADS,
        in_channels=32,
        num_layers=2,
        norm_num_groups=8,
        cross_attention_dim=24,
        use_linear_projection=True,
        qk_norm="rms_norm",
        num_kv_heads=1,
        ff_mult=3,
    )
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(DreamLiteAttnProcessor2_0())  # as the U-Net does; the default one has no grouped heads
    inputs = {
        "hidden_states": noise(2, 32, 4, 5),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": steps(),  # not looked at: the U-Net around it adds the time
        "encoder_attention_mask": padded(),
    }
    return Case(model, inputs)


@case("Transformer2DModel")
def transformer_2d() -> Case:
    model = Transformer2DModel(
        **HEADS,
        in_channels=6,
        out_channels=10,
        num_layers=2,
        cross_attention_dim=48,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=24,
    )
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": steps(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": padded(),
    }
    return Case(model, inputs)


@case("TransformerTemporalModel")
def transformer_temporal() -> Case:
    model = TransformerTemporalModel(
        **HEADS,
        in_channels=32,
        num_layers=2,
        norm_num_groups=8,
        positional_embeddings="sinusoidal",
        num_positional_embeddings=9,
    )
    inputs = {
        "hidden_states": noise(6, 32, 4, 5),  # two samples of three frames each
        "timestep": steps(),  # not looked at: the U-Net around it adds the time
        "num_frames": 3,
    }
    return Case(model, inputs)


@case("T5FilmDecoder")
def t5_film_decoder() -> Case:
    model = T5FilmDecoder(
        input_dims=10, targets_length=12, d_model=48, num_layers=2, num_heads=4, d_kv=12, d_ff=80, dropout_rate=0.1
    )
    notes, spectrogram = padded(), torch.ones(2, 5, dtype=torch.long)
    spectrogram[0, 3:] = 0
    inputs = {
        "encodings_and_masks": [(noise(2, 7, 48), notes), (noise(2, 5, 48, seed=1), spectrogram)],
        "decoder_input_tokens": noise(2, 12, 10, seed=2),
        "decoder_noise_time": steps(1.0),
    }
    return Case(model, inputs, timestep="decoder_noise_time")


@case("LatteTransformer3DModel")
def latte() -> Case:
    model = LatteTransformer3DModel(
        **HEADS,
        in_channels=6,
        out_channels=10,
        num_layers=2,
        cross_attention_dim=48,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=24,
        video_length=3,
    )
    inputs = {
        "hidden_states": noise(2, 6, 3, 8, 10),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": steps(),
        "enable_temporal_attentions": True,
    }
    return Case(model, inputs)
