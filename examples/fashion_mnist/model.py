"""The example's DiT: a small FLUX on 4 x 4 pixel patches, its class label as the only text token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from edit_compile import RouterConfig
from edit_compile.elastic.storage import load_elastic
from edit_compile.elastic.transformer import ElasticTransformer, elasticize
from examples.fashion_mnist.data import NO_CLASS

WEIGHTS = Path(__file__).parent / "weights"
TOKENS, CHANNELS, LABEL_CHANNELS = 49, 16, 16
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


def image_ids() -> Tensor:
    """Positions of the 49 patches, (49, 3) float32: zero, row, column."""
    ids = torch.zeros(7, 7, 3)
    ids[..., 1] = torch.arange(7)[:, None]
    ids[..., 2] = torch.arange(7)[None]
    return ids.reshape(TOKENS, 3)


def inputs(x: Tensor, t: Tensor, labels: Tensor) -> dict[str, Any]:
    """Keyword arguments of the model's forward.

    x: (B, 49, 16) float32; t: (B,) float32 in [0, 1], 1 is pure noise; labels: (B,) int64 in 0..10, 10 is "no class".
    """
    onehot = nn.functional.one_hot(labels, NO_CLASS + 1).to(x.dtype)
    label = nn.functional.pad(onehot, (0, LABEL_CHANNELS - onehot.shape[1]))
    return {
        "hidden_states": x,
        "encoder_hidden_states": label[:, None],
        "pooled_projections": label,
        "timestep": t,
        "img_ids": image_ids().to(x.device),
        "txt_ids": torch.zeros(1, 3, device=x.device),
        "return_dict": False,
    }


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
