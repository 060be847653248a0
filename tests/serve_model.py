"""A small FLUX with random weights and tiers, for the tests of examples/serve."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from diffusers import FluxTransformer2DModel

import edit_compile
from edit_compile import CompiledTransformer, ReusePolicy, ScheduledPolicy
from examples.fashion_mnist.model import CHANNELS, CONFIG, TOKENS, inputs
from runtime.routing.policy import REUSE

HALF = np.array([[1, 1], [REUSE, REUSE], [1, 0.5], [-2, 1], [1, REUSE], [REUSE, -2]])


def small_compiled() -> CompiledTransformer:
    """Two blocks; tiers "half", of six steps, and "every third"."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**{**CONFIG, "num_layers": 1, "num_single_layers": 1}).eval()
    x = torch.randn(2, TOKENS, CHANNELS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = inputs(x, torch.tensor([0.3, 0.7]), torch.tensor([1, 10]))
        made = edit_compile.compile(model, inputs=example, engine="torch")
    made.add_tier("half", ScheduledPolicy(HALF, routed=False), steps=len(HALF))
    made.add_tier("every third", ReusePolicy(2, warmup_steps=1, order=1))
    return made
