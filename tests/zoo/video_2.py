"""Zoo cases of Wan and the video models that descend from it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import (
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    ChronoEditTransformer3DModel,
    HeliosTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimate2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn

from tests.zoo.registry import Case, case, noise

STEPS = torch.tensor([900.0, 400.0])
WAN: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 72,
    "num_layers": 2,
}


def wan_inputs(text: int = 7) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 8, 3, 4, 10),
        "timestep": STEPS,
        "encoder_hidden_states": noise(2, text, 20, seed=1),
    }


@case("WanTransformer3DModel")
def wan() -> Case:
    return Case(WanTransformer3DModel(rope_max_seq_len=32, **WAN), wan_inputs())


@case("WanVACETransformer3DModel")
def vace() -> Case:
    # three blocks of control, since the first alone projects its input
    model = WanVACETransformer3DModel(
        rope_max_seq_len=32, vace_layers=[0, 1, 3], vace_in_channels=14, **(WAN | {"num_layers": 4})
    )
    inputs = {
        "control_hidden_states": noise(2, 14, 3, 4, 10, seed=2),
        "control_hidden_states_scale": torch.tensor([1.0, 0.8, 0.6]),
    }
    return Case(model, wan_inputs() | inputs)


@case("WanAnimateTransformer3DModel")
def animate() -> Case:
    # 512 tokens of text, since the attention takes the tokens before the last 512 for the image
    model = WanAnimateTransformer3DModel(
        latent_channels=6,
        image_dim=22,
        added_kv_proj_dim=48,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=10,
        motion_dim=5,
        motion_encoder_dim=14,
        face_encoder_hidden_dim=18,
        face_encoder_num_heads=3,
        inject_face_latents_blocks=2,
        **(WAN | {"in_channels": 16, "out_channels": 6, "num_layers": 4}),
    )
    inputs = {
        "hidden_states": noise(2, 16, 4, 4, 10),
        "encoder_hidden_states_image": noise(2, 5, 22, seed=2),
        "pose_hidden_states": noise(2, 6, 3, 4, 10, seed=3),
        "face_pixel_values": noise(2, 3, 9, 16, 16, seed=4),
    }
    return Case(model, wan_inputs(text=512) | inputs)


class LayerKeys(NamedTuple):
    """What a block reads of WanAnimate2KVLayerCache, as tensors that can be seen."""

    key: Tensor
    value: Tensor

    def get(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value


class CachedPass(nn.Module):
    """WanAnimate2's pass over cached reference tokens, given the cache and the grid as tensors and plain numbers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: list[Tensor],
        timestep: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        reference_grid: list[int],
        **others: Any,
    ) -> Any:
        layers = dict(enumerate(map(LayerKeys, keys, values)))
        grids = torch.tensor([reference_grid] * len(hidden_states))
        given = {"kv_cache": layers, "kv_cache_mode": "cached", "reference_grid_sizes": grids}
        return self.model(hidden_states, timestep, **given, **others)


def animate2_model() -> WanAnimate2Transformer3DModel:
    return WanAnimate2Transformer3DModel(
        text_len=9,
        in_dim=14,
        dim=48,
        ffn_dim=72,
        freq_dim=20,
        text_dim=24,
        out_dim=8,
        num_heads=3,
        num_layers=2,
    )


def animate2_bare() -> Case:
    """The class as it is: its cache of keys and values is an object of its own class."""
    inputs = animate2_inputs()
    cache = WanAnimate2KVCache(2)
    for layer, (key, value) in enumerate(zip(inputs.pop("keys"), inputs.pop("values"), strict=True)):
        cache.get(layer).store(key, value)
    grids = torch.tensor([inputs.pop("reference_grid")] * 2)
    given = {"kv_cache": cache, "kv_cache_mode": "cached", "reference_grid_sizes": grids}
    return Case(animate2_model().eval(), inputs | given)


@case("WanAnimate2Transformer3DModel")
def animate2() -> Case:
    return Case(CachedPass(animate2_model()), animate2_inputs())


def animate2_inputs() -> dict[str, Any]:
    # the image has 1280 channels in any configuration
    return {
        "hidden_states": [noise(8, 3, 4, 10), noise(8, 3, 4, 10, seed=1)],
        "timestep": STEPS,
        "encoder_hidden_states": [noise(7, 24, seed=2), noise(5, 24, seed=3)],
        "condition_latents": [noise(6, 3, 4, 10, seed=4), noise(6, 3, 4, 10, seed=5)],
        "keys": [noise(2, 20, 3, 16, seed=7 + layer) for layer in range(2)],
        "values": [noise(2, 20, 3, 16, seed=9 + layer) for layer in range(2)],
        "seq_len": 30,
        "encoder_hidden_states_image": noise(2, 5, 1280, seed=6),
        "reference_grid": [2, 2, 5],
        "origin_len": 5,
        "origin_area": [32, 80],
    }


@case("SkyReelsV2Transformer3DModel")
def skyreels() -> Case:
    return Case(SkyReelsV2Transformer3DModel(rope_max_seq_len=32, **WAN), wan_inputs())


@case("ChronoEditTransformer3DModel")
def chronoedit() -> Case:
    # 512 tokens of text, since the attention takes the tokens before the last 512 for the image
    model = ChronoEditTransformer3DModel(rope_max_seq_len=32, image_dim=22, added_kv_proj_dim=48, **WAN)
    return Case(model, wan_inputs(text=512) | {"encoder_hidden_states_image": noise(2, 5, 22, seed=2)})


@case("AnyFlowTransformer3DModel")
def anyflow() -> Case:
    inputs = {
        "hidden_states": noise(2, 3, 8, 4, 10),
        "timestep": STEPS[:, None].repeat(1, 3),
        "r_timestep": STEPS[:, None].repeat(1, 3) / 4,
    }
    return Case(AnyFlowTransformer3DModel(rope_max_seq_len=32, **WAN), wan_inputs() | inputs)


@case("AnyFlowFARTransformer3DModel")
def anyflow_far() -> Case:
    model = AnyFlowFARTransformer3DModel(rope_max_seq_len=32, full_chunk_limit=3, **WAN)
    cache = {
        layer: {
            "full_cache": noise(2, 2, 4, 90, 12, seed=3 + layer),
            "compressed_cache": noise(2, 2, 4, 9, 12, seed=5 + layer),
        }
        for layer in range(2)
    }
    inputs = {
        "hidden_states": noise(2, 3, 8, 4, 10),
        "timestep": STEPS[:, None].repeat(1, 3),
        "r_timestep": STEPS[:, None].repeat(1, 3) / 4,
        "chunk_partition": [1, 3],
        "kv_cache": cache,
        "kv_cache_flag": {"num_cached_chunks": 1, "is_cache_step": False},
    }
    return Case(model, wan_inputs() | inputs)


@case("HeliosTransformer3DModel")
def helios() -> Case:
    model = HeliosTransformer3DModel(rope_dim=(4, 4, 4), is_amplify_history=True, **WAN)
    inputs = {
        "indices_hidden_states": (torch.arange(3) + 15).repeat(2, 1),
        "indices_latents_history_short": (torch.arange(3) + 12).repeat(2, 1),
        "indices_latents_history_mid": (torch.arange(4) + 8).repeat(2, 1),
        "indices_latents_history_long": torch.arange(8).repeat(2, 1),
        "latents_history_short": noise(2, 8, 3, 4, 10, seed=2),
        "latents_history_mid": noise(2, 8, 4, 4, 10, seed=3),
        "latents_history_long": noise(2, 8, 8, 4, 10, seed=4),
    }
    return Case(model, wan_inputs() | inputs)
