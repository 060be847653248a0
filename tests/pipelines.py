"""Diffusers pipelines around tiny random parts: VAE, text encoders, and tokenizers over a dozen words."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tests.models import randomised

WORDS = ("<pad>", "<unk>", "<s>", "</s>", "a", "red", "blue", "cat", "dog", "house", "on", "the", "hill")
TEXT = 32


def flux_transformer() -> nn.Module:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    return randomised(model)


def flux_pipeline(transformer: nn.Module) -> FluxPipeline:
    """FLUX at 32 x 32 pixels: 64 image tokens."""
    torch.manual_seed(0)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4),
        text_encoder=CLIPTextModel(_clip()).eval(),
        tokenizer=word_tokenizer(),
        text_encoder_2=T5EncoderModel(_t5()).eval(),
        tokenizer_2=word_tokenizer(),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd3_transformer() -> nn.Module:
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT,
        caption_projection_dim=64,
        pooled_projection_dim=2 * TEXT,
        pos_embed_max_size=16,
    )
    return randomised(model)


def sd3_pipeline(transformer: nn.Module) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 at 32 x 32 pixels; its guidance is batched."""
    torch.manual_seed(0)
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4),
        text_encoder=CLIPTextModelWithProjection(_clip()).eval(),
        tokenizer=word_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip()).eval(),
        tokenizer_2=word_tokenizer(),
        text_encoder_3=T5EncoderModel(_t5(2 * TEXT)).eval(),
        tokenizer_3=word_tokenizer(),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def _clip() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=TEXT,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=TEXT,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )


def _t5(width: int = TEXT) -> T5Config:
    return T5Config(vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4)


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=77,
    )
