"""The example's DiT: a small FLUX on 4 x 4 pixel patches, its class label as the only text token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import nn

from edit_compile import RouterConfig
from edit_compile.elastic.storage import load_elastic
from edit_compile.elastic.transformer import ElasticTransformer, elasticize
from examples.fashion_mnist.call import CHANNELS as CHANNELS
from examples.fashion_mnist.call import LABEL_CHANNELS, inputs
from examples.fashion_mnist.call import TOKENS as TOKENS
from examples.fashion_mnist.call import image_ids as image_ids
from examples.fashion_mnist.data import NO_CLASS

WEIGHTS = Path(__file__).parent / "weights"
ROUTER = RouterConfig(token_stride=4)
"""In blocks this small a router of all tokens takes a fifth of a call; the committed weights were trained with one."""
CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": CHANNELS,
    "num_layers": 3,
    "num_single_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": LABEL_CHANNELS,
    "pooled_projection_dim": LABEL_CHANNELS,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}


def dense_model() -> FluxTransformer2DModel:
    """A new model of 3.4 M parameters; modulations and the last linear start at zero (every block an identity)."""
    model = FluxTransformer2DModel(**CONFIG)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if "norm" in name.split(".")[-2:][0] or name == "proj_out":
            nn.init.zeros_(module.weight)
        elif "blocks" in name:
            nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    return model


def load_model(name: str) -> nn.Module:
    """The trained "dense" or "elastic" model of this folder, or a training checkpoint's averaged weights, in eval mode.

    A checkpoint is a folder with ema.safetensors, of the dense or of the elastic training.
    """
    if name == "elastic":
        return load_elastic(WEIGHTS / "elastic")
    path = WEIGHTS / "dense.safetensors" if name == "dense" else Path(name) / "ema.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give 'dense', 'elastic' or a folder checkpoints/step-XXXXXXXX")
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    model: nn.Module = dense_model()
    if any(name.startswith("routers.") for name in tensors):
        model = elastic_model(model)
    model.load_state_dict(tensors)
    return model.eval()


def elastic_model(dense: nn.Module) -> ElasticTransformer:
    """`dense` with fully open routers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS, CHANNELS, generator=generator)
    example = inputs(x, torch.tensor([0.3, 0.7]), torch.tensor([1, NO_CLASS]))
    return elasticize(dense, example, config=ROUTER)
