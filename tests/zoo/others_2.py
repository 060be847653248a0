"""Zoo cases of Kandinsky, and of the models that pack their tokens or take prepared features."""

from __future__ import annotations

import torch
from diffusers import (
    Cosmos3OmniTransformer,
    Kandinsky5Transformer3DModel,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6Transformer3DModel,
    MiniMaxH3Transformer3DModel,
    RFD4ProteinaTransformer,
)

from tests.zoo.registry import Case, case, noise


@case("Kandinsky5Transformer3DModel")
def kandinsky5() -> Case:
    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=18,
        time_dim=40,
        out_visual_dim=4,
        model_dim=48,
        ff_dim=80,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 4, 8),
        visual_cond=True,
        attention_type="regular",
    )
    inputs = {
        "hidden_states": noise(2, 5, 6, 8, 9),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "pooled_projections": noise(2, 18, seed=2),
        "timestep": torch.tensor([900.0, 400.0]),
        "visual_rope_pos": [torch.arange(5), torch.arange(3), torch.arange(4)],
        "text_rope_pos": torch.arange(7),
        "scale_factor": (1.0, 2.0, 2.0),
    }
    return Case(model, inputs)


@case("Kandinsky6Transformer3DModel")
def kandinsky6() -> Case:
    model = Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=18,
        time_dim=40,
        model_dim=48,
        ff_dim=80,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 4, 8),
        in_audio_dim=10,
        out_audio_dim=10,
        model_dim_a=32,
        time_dim_a=20,
        ff_dim_a=56,
        axes_dims_a=(4, 4, 8),
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=3,
    )
    inputs = {
        "hidden_states": noise(2, 5, 6, 8, 9),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "pooled_projections": noise(2, 18, seed=2),
        "timestep": torch.tensor([900.0, 400.0]),
        "audio_hidden_states": noise(2, 11, 10, seed=3),
        "visual_rope_pos": (torch.tensor([0, 1, 2, 3, 0]), torch.arange(3), torch.arange(4)),
        "encoder_attention_mask": torch.arange(7) < torch.tensor([[7], [4]]),
        "visual_token_type_ids": torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 2]]),
    }
    return Case(model, inputs)


@case("Kandinsky6SRTransformer3DModel")
def kandinsky6_sr() -> Case:
    # At a threshold of 1 every block is kept: run eagerly, torch's flex attention pays no heed to the blocks' mask.
    model = Kandinsky6SRTransformer3DModel(
        in_visual_dim=4,
        out_visual_dim=12,
        time_dim=40,
        model_dim=48,
        ff_dim=80,
        num_visual_blocks=2,
        axes_dims=(4, 4, 8),
        nabla_threshold=1.0,
        nabla_window=(1, 1, 1),
    )
    inputs = {"hidden_states": noise(2, 3, 8, 8, 9), "timestep": torch.tensor([900.0, 400.0])}
    return Case(model, inputs)


@case("MiniMaxH3Transformer3DModel")
def minimax_h3() -> Case:
    model = MiniMaxH3Transformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        hidden_size=40,
        num_layers=2,
        ffn_dim=80,
        in_channels=4,
        audio_in_channels=10,
        text_dim=24,
        freq_dim=18,
        time_embed_hidden_dim=28,
        time_embed_dim=22,
        rope_freq_dim=1,
    )
    # 7 tokens of text, 5 of audio and 12 of video, the last 4 of which are the condition, in one sequence. The
    # timesteps are the levels of noise that occur in it, whatever the batch.
    frame, row, column = torch.meshgrid(torch.arange(3), torch.arange(2), torch.arange(2), indexing="ij")
    video = torch.stack([frame, row, column], dim=-1).flatten(0, 2)
    line = torch.arange(12)[:, None].expand(-1, 3)
    inputs = {
        "hidden_states": noise(2, 12, 16),
        "audio_hidden_states": noise(2, 5, 10, seed=1),
        "encoder_hidden_states": noise(2, 7, 24, seed=2),
        "timestep": torch.tensor([0.9, 0.4, 0.1]),
        "timestep_indices": torch.tensor([0] * 7 + [1] * 5 + [0] * 8 + [2] * 4),
        "token_tags": torch.tensor([1] * 7 + [2] * 5 + [0] * 12),
        "position_ids": torch.cat([line, video + 12]),
        "video_indices": torch.arange(12, 24),
        "audio_indices": torch.arange(7, 12),
        "text_indices": torch.arange(7),
    }
    return Case(model, inputs)


@case("Cosmos3OmniTransformer")
def cosmos3_omni() -> Case:
    model = Cosmos3OmniTransformer(
        head_dim=12,
        hidden_size=48,
        intermediate_size=80,
        latent_channel=4,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        patch_latent_dim=16,
        rope_axes_dim=(2, 2, 2),
        vocab_size=50,
        sound_dim=10,
        sound_gen=True,
    )
    # One sample: its text, video and sound are one sequence without a batch dimension.
    text, video, sound = torch.arange(7), torch.arange(7, 25), torch.arange(25, 30)
    frame, row, column = torch.meshgrid(torch.arange(3), torch.arange(2), torch.arange(3), indexing="ij")
    grid = torch.stack([frame, row, column]).flatten(1) + 20
    inputs = {
        "input_ids": torch.tensor([3, 14, 15, 9, 26, 5, 35]),
        "text_indexes": text,
        "position_ids": torch.cat([text.expand(3, -1), grid, (torch.arange(5) + 20).expand(3, -1)], dim=1),
        "und_len": 7,
        "sequence_length": 30,
        "vision_tokens": [noise(1, 4, 3, 4, 6)],
        "vision_token_shapes": [(3, 2, 3)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video[6:],
        "vision_timesteps": torch.full((12,), 900.0),
        "vision_noisy_frame_indexes": [torch.tensor([1, 2])],
        "sound_tokens": [noise(10, 5, seed=1)],
        "sound_token_shapes": [(5, 1, 1)],
        "sound_sequence_indexes": sound,
        "sound_mse_loss_indexes": sound,
        "sound_timesteps": torch.full((5,), 900.0),
        "sound_noisy_frame_indexes": [torch.arange(5)],
    }
    return Case(model, inputs, timestep="vision_timesteps")


@case("RFD4ProteinaTransformer")
def rfd4_proteina() -> Case:
    model = RFD4ProteinaTransformer(
        nlayers=4,
        token_dim=48,
        nheads=4,
        dim_cond=20,
        pair_repr_dim=18,
        latent_dim=6,
        token_type_emb_dim=5,
        cath_emb_dim=3,
        t_emb_dim=10,
        seq_sep_dim=8,
        xt_pair_dist_dim=9,
        tri_mult_c=14,
        num_sequence_classes=25,
    )
    tokens, atoms = 11, 37
    valid = torch.arange(tokens) < torch.tensor([[tokens], [8]])
    contacts = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord")
    conditioning = {
        f"condition_{name}_1_atom": torch.randint(2, (2, tokens, atoms)) for name in (*contacts, "rasa-binned")
    } | {
        "condition_index-group_1_token": torch.randint(3, (2, tokens)),
        "condition_cath-label_1_residue": torch.randint(4, (2, tokens, 3)),
        "is_in_context_conditioning": torch.arange(tokens).expand(2, -1) == 3,
        "supports_local_latent": torch.arange(tokens).expand(2, -1) != 4,
        "token_bond_path_length": torch.randint(8, (2, tokens, tokens)),
        "molecule_iid": torch.randint(3, (2, tokens)),
        "molecule_entity_id": torch.randint(3, (2, tokens)),
    }
    inputs = {
        "bb_ca": noise(2, tokens, 3),
        "local_latents": noise(2, tokens, 6, seed=1),
        "bb_ca_time": torch.tensor([0.9, 0.4]),
        "local_latents_time": torch.tensor([0.8, 0.3]),
        "padding_mask": valid,
        "token_type": torch.randint(3, (2, tokens)),
        "atom37_mask": torch.rand(2, tokens, atoms) < 0.6,
        "conditioning": conditioning,
    }
    return Case(model, inputs, timestep="bb_ca_time")
