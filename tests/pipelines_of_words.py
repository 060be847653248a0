"""Wan's and Qwen-Image's pipelines around tiny random parts with text encoders, so that they take prompts of words.

Their VAEs only say how large latents are.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, UMT5Config, UMT5EncoderModel

from tests.pipelines import WORDS, word_tokenizer
from tests.pipelines_zoo import transformer


def wan_pipeline(second: bool = False) -> WanPipeline:
    """With UniPC, a multistep sampler; `second`: another transformer makes the later steps, as in Wan 2.2."""
    model = transformer("WanTransformer3DModel")
    torch.manual_seed(0)
    made = WanPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(WORDS), d_model=20, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
        ).eval(),
        vae=AutoencoderKLWan(z_dim=8, temperal_downsample=[False, True, True], **_vae(8)).eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=model,
        transformer_2=transformer("WanTransformer3DModel", num_layers=3) if second else None,
        boundary_ratio=0.85 if second else None,
    )
    made.set_progress_bar_config(disable=True)
    return made


def qwen_pipeline() -> QwenImagePipeline:
    """Its guidance is a second call, with a prompt of another length."""
    model: nn.Module = transformer("QwenImageTransformer2DModel")
    torch.manual_seed(0)
    made = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage(z_dim=2, temperal_downsample=[False, True, True], **_vae(2)).eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(_qwen_text()).eval(),
        tokenizer=word_tokenizer(),
        transformer=model,
    )
    made.set_progress_bar_config(disable=True)
    return made


def _vae(channels: int) -> dict[str, Any]:
    still = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    return {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, **still}


def _qwen_text() -> Any:
    sizes = {"hidden_size": 24, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0}
    text = {
        **sizes,
        "vocab_size": len(WORDS),
        "num_key_value_heads": 2,
        "rope_parameters": rotary,
        "rope_scaling": rotary,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision)
