"""Diffusers pipelines around the zoo's transformers and nothing else: text comes as embeddings, images stay latents.

Every maker gives a pipeline and the arguments of one call, with guidance on wherever the pipeline has it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from tests.models import randomised
from tests.zoo import CASES
from tests.zoo.registry import noise

STEPS = 3
TEXT = 7
IMAGE = {"height": 64, "width": 80}
VIDEO = {"height": 32, "width": 80, "num_frames": 9}


@dataclass(frozen=True)
class Made:
    """A pipeline, and the arguments of one call of it."""

    pipeline: Any
    call: dict[str, Any]

    def generate(self, seed: int) -> Tensor:
        """The latents that one call makes."""
        generator = torch.Generator().manual_seed(seed)
        shared = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
        latents: Tensor = self.pipeline(**shared, **self.call, generator=generator)[0]
        return latents


PIPELINES: dict[str, Callable[[], Made]] = {}


def entry(make: Callable[[], Made]) -> Callable[[], Made]:
    """Enter a maker under its name."""
    PIPELINES[make.__name__] = make
    return make


def transformer(name: str, **changes: Any) -> nn.Module:
    """The zoo's model of that class, with another configuration where the pipeline needs one."""
    model = CASES[name]().model
    if not changes:
        return model
    return randomised(type(model).from_config({**model.config, **changes}))


def pipeline(name: str, model: nn.Module, scheduler: Any = None, **parts: Any) -> Any:
    """A pipeline without text encoders, tokenizers and VAE."""
    made = getattr(diffusers, name)
    needed = inspect.signature(made).parameters.values()
    absent = {parameter.name: None for parameter in needed if parameter.default is parameter.empty}
    given = {"transformer": model, "scheduler": scheduler or FlowMatchEulerDiscreteScheduler(), **parts}
    built = made(**{**absent, **given})
    built.set_progress_bar_config(disable=True)
    return built


def embeddings(width: int, key: str = "prompt_embeds", seed: int = 0, length: int = TEXT) -> dict[str, Tensor]:
    """Embedded words of a prompt and of a negative one."""
    return {key: noise(1, length, width, seed=seed + 1), f"negative_{key}": noise(1, length, width, seed=seed + 2)}


def pooled(width: int) -> dict[str, Tensor]:
    """One vector for a prompt, another for a negative one."""
    return {"pooled_prompt_embeds": noise(1, width, seed=5), "negative_pooled_prompt_embeds": noise(1, width, seed=6)}


def masks(key: str = "prompt_attention_mask", dtype: torch.dtype = torch.long) -> dict[str, Tensor]:
    """A prompt of seven tokens and a negative one of four."""
    mask = torch.ones(1, TEXT, dtype=dtype)
    return {key: mask, f"negative_{key}": mask * (torch.arange(TEXT) < 4).to(dtype)}


@entry
def flux() -> Made:
    made = pipeline("FluxPipeline", transformer("FluxTransformer2DModel"))
    return Made(made, {**IMAGE, **embeddings(24), **pooled(10), "true_cfg_scale": 3.0})


@entry
def qwen_image() -> Made:
    made = pipeline("QwenImagePipeline", transformer("QwenImageTransformer2DModel"))
    padded = masks()["negative_prompt_attention_mask"]
    given = {"prompt_embeds_mask": padded, "negative_prompt_embeds_mask": padded, "true_cfg_scale": 3.0}
    return Made(made, {**IMAGE, **embeddings(24), **given})


@entry
def stable_diffusion_3() -> Made:
    made = pipeline("StableDiffusion3Pipeline", transformer("SD3Transformer2DModel"))
    return Made(made, {**IMAGE, **embeddings(24), **pooled(10), "guidance_scale": 4.0})


@entry
def pixart_sigma() -> Made:
    model = transformer("PixArtTransformer2DModel", out_channels=12, use_additional_conditions=False)
    made = pipeline("PixArtSigmaPipeline", model, DPMSolverMultistepScheduler())
    return Made(made, {**IMAGE, **embeddings(24), **masks(), "negative_prompt": None, "use_resolution_binning": False})


@entry
def sana() -> Made:
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    made = pipeline("SanaPipeline", transformer("SanaTransformer2DModel", out_channels=6), scheduler)
    size = {"height": 128, "width": 160, "use_resolution_binning": False}
    return Made(made, {**size, **embeddings(24), **masks(), "negative_prompt": None})


@entry
def wan() -> Made:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    made = pipeline("WanPipeline", transformer("WanTransformer3DModel"), scheduler)
    return Made(made, {**VIDEO, **embeddings(20)})


@entry
def wan_two_transformers() -> Made:
    """One transformer for the first steps, another for the rest."""
    made = pipeline(
        "WanPipeline",
        transformer("WanTransformer3DModel"),
        transformer_2=transformer("WanTransformer3DModel", num_layers=3),
        boundary_ratio=0.6,
    )
    return Made(made, {**VIDEO, **embeddings(20)})


@entry
def wan_timestep_per_token() -> Made:
    made = pipeline("WanPipeline", transformer("WanTransformer3DModel"), expand_timesteps=True)
    return Made(made, {**VIDEO, **embeddings(20)})


@entry
def cogvideox() -> Made:
    made = pipeline("CogVideoXPipeline", transformer("CogVideoXTransformer3DModel"), CogVideoXDDIMScheduler())
    return Made(made, {**VIDEO, **embeddings(24)})


@entry
def ltx() -> Made:
    made = pipeline("LTXPipeline", transformer("LTXVideoTransformer3DModel"))
    return Made(made, {"height": 64, "width": 160, "num_frames": 17, **embeddings(20), **masks()})


@entry
def hunyuan_video() -> Made:
    made = pipeline("HunyuanVideoPipeline", transformer("HunyuanVideoTransformer3DModel"))
    return Made(made, {**VIDEO, **embeddings(20), **pooled(14), **masks(), "true_cfg_scale": 3.0})


@entry
def lumina2() -> Made:
    made = pipeline("Lumina2Pipeline", transformer("Lumina2Transformer2DModel"))
    return Made(made, {**IMAGE, **embeddings(24), **masks()})


@entry
def z_image() -> Made:
    """Lists of prompts, of two lengths."""
    made = pipeline("ZImagePipeline", transformer("ZImageTransformer2DModel"))
    prompts = {"prompt_embeds": [noise(TEXT, 24, seed=1)], "negative_prompt_embeds": [noise(5, 24, seed=2)]}
    return Made(made, {**IMAGE, **prompts})


@entry
def chroma() -> Made:
    made = pipeline("ChromaPipeline", transformer("ChromaTransformer2DModel"))
    return Made(made, {**IMAGE, **embeddings(24), **masks(dtype=torch.float32)})


@entry
def flux2() -> Made:
    made = pipeline("Flux2Pipeline", transformer("Flux2Transformer2DModel"))
    return Made(made, {**IMAGE, "prompt_embeds": noise(1, TEXT, 24, seed=1)})


@entry
def hidream_image() -> Made:
    made = pipeline("HiDreamImagePipeline", transformer("HiDreamImageTransformer2DModel"))
    made.default_sample_size = 8  # the pipeline scales every size to this area
    llama = {"prompt_embeds_llama3": noise(5, 1, 9, 14, seed=3), "negative_prompt_embeds_llama3": noise(5, 1, 9, 14)}
    return Made(made, {"height": 64, "width": 64, **embeddings(24, "prompt_embeds_t5"), **llama, **pooled(10)})


@entry
def aura_flow() -> Made:
    made = pipeline("AuraFlowPipeline", transformer("AuraFlowTransformer2DModel"))
    return Made(made, {**IMAGE, **embeddings(24), **masks()})


@entry
def hunyuan_dit() -> Made:
    """The transformer of the pipeline with two text encoders; it reads attributes that no configuration holds."""
    model = transformer("HunyuanDiT2DModel", text_len_t5=TEXT)
    made = pipeline("HunyuanDiTPipeline", model, DDPMScheduler(), requires_safety_checker=False)
    texts = embeddings(28) | masks() | embeddings(24, "prompt_embeds_2", seed=2) | masks("prompt_attention_mask_2")
    return Made(made, {**IMAGE, **texts, "use_resolution_binning": False})


@entry
def prx() -> Made:
    made = pipeline("PRXPipeline", transformer("PRXTransformer2DModel"))
    call = {"prompt": None, "use_resolution_binning": False, "guidance_scale": 4.0}
    return Made(made, {**IMAGE, **embeddings(24), **masks(dtype=torch.bool), **call})


@entry
def cogview4() -> Made:
    made = pipeline("CogView4Pipeline", transformer("CogView4Transformer2DModel"))
    return Made(made, {**IMAGE, **embeddings(24)})


@entry
def mochi() -> Made:
    made = pipeline("MochiPipeline", transformer("MochiTransformer3DModel"))
    return Made(made, {"height": 32, "width": 80, "num_frames": 13, **embeddings(40), **masks(dtype=torch.bool)})
