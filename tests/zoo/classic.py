"""Zoo cases of the one-stream image models: DiT, PixArt and what grew out of them."""

from __future__ import annotations

import torch
from diffusers import (
    DiTTransformer2DModel,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    OmniGenTransformer2DModel,
    PixArtTransformer2DModel,
    PRXTransformer2DModel,
    SanaTransformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from torch import Tensor, nn

from tests.zoo.registry import Case, case, noise

HEADS = {"attention_head_dim": 12, "num_attention_heads": 4}


def steps(scale: float = 1000.0) -> Tensor:
    return torch.tensor([0.9, 0.4]) * scale


def padded(dtype: torch.dtype = torch.long) -> Tensor:
    """Mask of two prompts in seven tokens, the second one shorter."""
    mask = torch.ones(2, 7, dtype=dtype)
    mask[1, 4:] = 0
    return mask


@case("DiTTransformer2DModel")
def dit() -> Case:
    model = DiTTransformer2DModel(
        **HEADS, in_channels=6, out_channels=10, num_layers=2, sample_size=8, num_embeds_ada_norm=9
    )
    inputs = {
        "hidden_states": noise(2, 6, 8, 8),  # square: the model takes the root of the token count
        "timestep": torch.tensor([900, 400]),
        "class_labels": torch.tensor([3, 5]),
    }
    return Case(model, inputs)


@case("PixArtTransformer2DModel")
def pixart() -> Case:
    model = PixArtTransformer2DModel(
        **HEADS,
        in_channels=6,
        out_channels=10,
        num_layers=2,
        cross_attention_dim=48,
        sample_size=16,
        caption_channels=24,
        use_additional_conditions=True,
    )
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "encoder_attention_mask": padded(),
        "timestep": steps(),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[64.0, 80.0], [48.0, 96.0]]),
            "aspect_ratio": torch.tensor([[0.8], [0.5]]),
        },
    }
    return Case(model, inputs)


@case("SanaTransformer2DModel")
def sana() -> Case:
    model = SanaTransformer2DModel(
        **HEADS,
        in_channels=6,
        out_channels=10,
        num_layers=2,
        num_cross_attention_heads=3,
        cross_attention_head_dim=16,
        cross_attention_dim=48,
        caption_channels=24,
        sample_size=5,
    )
    inputs = {
        "hidden_states": noise(2, 6, 4, 5),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "encoder_attention_mask": padded(),
        "timestep": steps(),
    }
    return Case(model, inputs)


@case("HunyuanDiT2DModel")
def hunyuan_dit() -> Case:
    model = HunyuanDiT2DModel(
        **HEADS,
        in_channels=6,
        patch_size=2,
        sample_size=10,
        hidden_size=48,
        num_layers=6,
        cross_attention_dim=28,
        cross_attention_dim_t5=24,
        pooled_projection_dim=14,
        text_len=7,
        text_len_t5=5,
    )
    mask_t5 = torch.ones(2, 5, dtype=torch.long)
    mask_t5[0, 3:] = 0
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "timestep": steps(),
        "encoder_hidden_states": noise(2, 7, 28, seed=1),
        "text_embedding_mask": padded(),
        "encoder_hidden_states_t5": noise(2, 5, 24, seed=2),
        "text_embedding_mask_t5": mask_t5,
        "image_meta_size": torch.tensor([[64.0, 80, 64, 80, 0, 0], [48, 96, 64, 80, 8, 4]]),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(12, ((0, 0), (4, 5)), (4, 5), output_type="pt"),
    }
    return Case(model, inputs)


@case("LuminaNextDiT2DModel")
def lumina_next() -> Case:
    model = LuminaNextDiT2DModel(
        in_channels=6,
        hidden_size=48,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        cross_attention_dim=24,
    )
    nn.init.normal_(model.pad_token)  # left as torch.empty made it
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "timestep": steps(1.0),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "encoder_mask": padded(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(12, 9, 11),
        "cross_attention_kwargs": {"base_sequence_length": 16},
    }
    return Case(model, inputs)


@case("Lumina2Transformer2DModel")
def lumina2() -> Case:
    model = Lumina2Transformer2DModel(
        in_channels=6,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(30, 16, 16),
        cap_feat_dim=24,
    )
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "timestep": steps(1.0),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "encoder_attention_mask": padded(),
    }
    return Case(model, inputs)


@case("OmniGenTransformer2DModel")
def omnigen() -> Case:
    model = OmniGenTransformer2DModel(
        in_channels=6,
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=80,
        num_layers=2,
        pad_token_id=0,
        vocab_size=60,
        rope_scaling={"short_factor": [1.0] * 6, "long_factor": [1.5] * 6},
        pos_embed_max_size=8,
        time_step_dim=16,
    )
    # Eleven tokens of text, six of them placeholders of an image, one for the timestep, and twenty for the image made.
    tokens = torch.arange(22).reshape(2, 11) + 3
    mask = torch.ones(2, 32, 32, dtype=torch.long).tril()
    mask[:, 12:, 12:] = 1
    mask[1, :, :2] = 0
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "timestep": steps(1.0),
        "input_ids": tokens,
        "input_img_latents": [noise(1, 6, 4, 6, seed=seed) for seed in (1, 2)],
        "input_image_sizes": {0: [[4, 10]], 1: [[3, 9]]},
        "attention_mask": mask,
        "position_ids": torch.arange(32).repeat(2, 1),  # equal: the model rotates every row by those of the first
    }
    return Case(model, inputs)


@case("ZImageTransformer2DModel")
def z_image() -> Case:
    model = ZImageTransformer2DModel(
        in_channels=6,
        dim=48,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=24,
        axes_dims=[4, 4, 4],
        axes_lens=[64, 16, 16],
    )
    inputs = {
        "x": [noise(6, 1, 10, 14, seed=seed) for seed in (0, 1)],
        "t": steps(1.0),
        "cap_feats": [noise(7, 24, seed=2), noise(5, 24, seed=3)],
    }
    return Case(model, inputs)


@case("PRXTransformer2DModel")
def prx() -> Case:
    model = PRXTransformer2DModel(
        in_channels=6, context_in_dim=24, hidden_size=48, num_heads=4, depth=2, axes_dim=[4, 8]
    )
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "timestep": steps(1.0),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "attention_mask": padded(torch.bool),
    }
    return Case(model, inputs)
