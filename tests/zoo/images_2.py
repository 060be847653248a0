"""Zoo cases of the image models beside the FLUX family."""

from __future__ import annotations

import torch
from diffusers import (
    BriaFibo2Transformer2DModel,
    ErnieImageTransformer2DModel,
    HiDreamImageTransformer2DModel,
    Ideogram4Transformer2DModel,
    Krea2Transformer2DModel,
    NucleusMoEImageTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
)
from torch import nn

from tests.zoo.images import HEADS, grid, steps
from tests.zoo.registry import Case, case, noise


@case("QwenImageTransformer2DModel")
def qwen_image() -> Case:
    model = QwenImageTransformer2DModel(
        in_channels=8, out_channels=2, num_layers=2, **HEADS, joint_attention_dim=24, axes_dims_rope=(4, 4, 4)
    )
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    inputs = {
        "hidden_states": noise(2, 20, 8),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "encoder_hidden_states_mask": mask,
        "timestep": steps(),
        "img_shapes": [[(1, 4, 5)]] * 2,
    }
    return Case(model, inputs)


@case("QwenImage21Transformer2DModel")
def qwen_image_21() -> Case:
    model = QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=2, **HEADS, context_in_dim=24, axes_dims_rope=(4, 4, 4)
    )
    # Two prompts of one length with a 2 x 4 condition image (two slots of four tokens) and a 4 x 5 target (five slots).
    slots = torch.tensor([False] * 3 + [True] * 2 + [False] * 4 + [True] * 5)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0
    inputs = {
        "hidden_states": noise(2, 28, 8),
        "encoder_hidden_states": noise(2, 9, 24, seed=1),
        "encoder_hidden_states_mask": mask,
        "timestep": steps(),
        "img_shapes": [[(1, 2, 4), (1, 4, 5)]] * 2,
        "img_mask": slots.repeat(2, 1),
    }
    return Case(model, inputs)


@case("NucleusMoEImageTransformer2DModel")
def nucleus_moe_image() -> Case:
    model = NucleusMoEImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=4,
        attention_head_dim=12,
        num_attention_heads=6,
        num_key_value_heads=3,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 4),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=5,
        moe_intermediate_dim=40,
        capacity_factors=2.7,
    )
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # left as torch.empty made them
            nn.init.normal_(parameter, std=0.1)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    inputs = {
        "hidden_states": noise(2, 20, 8),
        "img_shapes": [(1, 4, 5)] * 2,
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "encoder_hidden_states_mask": mask,
        "timestep": steps(),
    }
    return Case(model, inputs)


@case("HiDreamImageTransformer2DModel")
def hidream_image() -> Case:
    model = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=6,
        num_layers=2,
        num_single_layers=2,
        **HEADS,
        caption_channels=[24, 14],
        text_emb_dim=10,
        num_routed_experts=3,
        num_activated_experts=2,
        axes_dims_rope=(4, 4, 4),
        max_resolution=(10, 12),
        llama_layers=[0, 2, 4, 1],
    )
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "timesteps": steps(1000),
        "encoder_hidden_states_t5": noise(2, 7, 24, seed=1),
        "encoder_hidden_states_llama3": noise(5, 2, 9, 14, seed=2),
        "pooled_embeds": noise(2, 10, seed=3),
    }
    return Case(model, inputs)


@case("Krea2Transformer2DModel")
def krea2() -> Case:
    model = Krea2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=104,
        timestep_embed_dim=16,
        text_hidden_dim=40,
        num_text_layers=5,
        text_num_attention_heads=4,
        text_num_key_value_heads=4,
        text_intermediate_size=88,
        axes_dims_rope=(4, 4, 4),
    )
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    inputs = {
        "hidden_states": noise(2, 20, 8),
        "encoder_hidden_states": noise(2, 7, 5, 40, seed=1),
        "timestep": steps(),
        "position_ids": torch.cat([torch.zeros(7, 3), grid(4, 5)]),
        "encoder_attention_mask": mask,
    }
    return Case(model, inputs)


@case("Ideogram4Transformer2DModel")
def ideogram4() -> Case:
    model = Ideogram4Transformer2DModel(
        in_channels=8,
        num_layers=2,
        **HEADS,
        intermediate_size=104,
        adaln_dim=36,
        llm_features_dim=24,
        mrope_section=(2, 2, 2),
    )
    text, image = [3] * 7, [2] * 20
    indicator = torch.tensor([text + image, [0] * 3 + text[3:] + image])
    positions = torch.cat([torch.arange(7)[:, None].expand(7, 3), grid(4, 5, first=7.0).long() + 7])
    inputs = {
        "hidden_states": torch.cat([torch.zeros(2, 7, 8), noise(2, 20, 8)], 1),
        "timestep": steps(),
        "encoder_hidden_states": torch.cat([noise(2, 7, 24, seed=1), torch.zeros(2, 20, 24)], 1),
        "position_ids": positions.repeat(2, 1, 1),
        "segment_ids": torch.where(indicator == 0, -1, 1),
        "indicator": indicator,
    }
    return Case(model, inputs)


@case("ErnieImageTransformer2DModel")
def ernie_image() -> Case:
    model = ErnieImageTransformer2DModel(
        hidden_size=48,
        num_attention_heads=4,
        num_layers=2,
        ffn_hidden_size=104,
        in_channels=6,
        out_channels=6,
        text_in_dim=24,
        rope_axes_dim=(4, 4, 4),
    )
    inputs = {
        "hidden_states": noise(2, 6, 4, 5),
        "timestep": steps(1000),
        "text_bth": noise(2, 7, 24, seed=1),
        "text_lens": torch.tensor([7, 4]),
    }
    return Case(model, inputs)


@case("BriaFibo2Transformer2DModel")
def bria_fibo2() -> Case:
    model = BriaFibo2Transformer2DModel(
        in_channels=6,
        dim=48,
        n_layers=4,
        n_refiner_layers=2,
        n_heads=4,
        cap_feat_dim=28,
        injection_layer_ids=(1, 3),
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=3,
        gist_max_text_len=9,
        axes_dims=(4, 4, 4),
        axes_lens=(40, 30, 30),
    )
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    inputs = {
        "hidden_states": noise(2, 6, 8, 10),
        "timestep": steps(),
        "encoder_hidden_states": noise(2, 3, 7, 28, seed=1),
        "encoder_attention_mask": mask,
        "context_latents": [noise(2, 6, 6, 10, seed=2)],
    }
    return Case(model, inputs)
