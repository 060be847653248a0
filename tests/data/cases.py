"""The bundles that every later version has to read: small models, and a recorded generation of each way of deciding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

import edit_compile
from edit_compile import CompiledTransformer, ReusePolicy, RouterConfig, RoutingPolicy, ScheduledPolicy
from runtime.bundle.program import Program
from runtime.routing.policy import EXTRAPOLATE, REUSE, SKIP
from tests.conftest import unsettle
from tests.data.record import STEPS, Record
from tests.models import PlainDiT, noise, randomised

WIDTHS = (0.5, 1.0)


class SmallBlock(nn.Module):
    """One stream, an MLP modulated by a vector, and the mean of the words."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.modulate = nn.Linear(dim, 2 * dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, words: Tensor, vector: Tensor, mask: Tensor | None = None) -> Tensor:
        scale, gate = self.modulate(F.silu(vector))[:, None].chunk(2, dim=-1)
        return x + gate * self.down(F.gelu(self.up(x * (1 + scale) + words.mean(1, keepdim=True))))


@dataclass(frozen=True)
class Case:
    """A bundle to make: a compiled model, one call's arguments, which graphs of plans to keep, and how to call it."""

    compiled: CompiledTransformer
    inputs: Mapping[str, Tensor]
    suffixes: tuple[str, ...]
    record: Record

    def program(self) -> Program:
        """What is saved: the program with its tiers, less the graphs that are not kept."""
        program = self.compiled._stored(self.compiled.program)
        kept = {n: d for n, d in program.files.items() if n.startswith("glue/") or n.endswith(self.suffixes)}
        return replace(program, files=kept)


def routed() -> Case:
    """Graphs for both engines; routers, a policy of its own, a schedule, and a nested tier with its figures."""
    model, inputs = _plain()
    elastic = edit_compile.elasticize(
        model, inputs, config=RouterConfig(hidden=8, widths=WIDTHS, modulation="low_rank")
    )
    unsettle(elastic)
    policy = RoutingPolicy(threshold=0.1, margin=0.6, max_reuse=2, warmup_steps=1)
    compiled = edit_compile.compile(elastic, WIDTHS, inputs=inputs, engine="torch", policy=policy)
    assert isinstance(compiled, CompiledTransformer)
    table = np.array([[1.0, 1.0, 1.0], [0.5, REUSE, SKIP], [EXTRAPOLATE, 0.5, 1.0], [1.0, EXTRAPOLATE, REUSE]])
    compiled.add_tier("schedule", ScheduledPolicy(table, routed=False, beyond="compute"), steps=STEPS)
    nested = ReusePolicy(1, 1.0, "first block", 1, 1, RoutingPolicy(0.01, 0.1, 3))
    compiled.add_tier(
        "nested", nested, quality_db=31.5, quality_interval=(30.0, 33.0), times_faster=1.75, flops_share=0.5,
        machine="none: made up",
    )  # fmt: skip
    record = Record(("torch", "onnxruntime"), "x", "t", ("schedule", "nested"))
    return Case(compiled, inputs, (".pt2", ".onnx"), record)


def onnx() -> Case:
    """Graphs of ONNX; no routers, and one tier."""
    model, inputs = _plain()
    compiled = edit_compile.compile(model, WIDTHS, inputs=inputs, engine="onnxruntime")
    assert isinstance(compiled, CompiledTransformer)
    compiled.add_tier("reuse", ReusePolicy(1))
    return Case(compiled, inputs, (".onnx",), Record(("onnxruntime",), "x", "t", ("reuse",)))


def flux() -> Case:
    """A model of diffusers: two kinds of blocks, rotary positions."""
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=6, pooled_projection_dim=6, guidance_embeds=False, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    rows, columns = torch.arange(4) // 2, torch.arange(4) % 2
    inputs = {
        "hidden_states": noise(2, 4, 4),
        "encoder_hidden_states": noise(2, 3, 6, seed=2),
        "pooled_projections": noise(2, 6, seed=3),
        "timestep": torch.ones(2),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).float(),
        "txt_ids": torch.zeros(3, 3),
    }
    compiled = edit_compile.compile(randomised(model), (1.0,), inputs=inputs, engine="torch")
    assert isinstance(compiled, CompiledTransformer)
    compiled.add_tier("schedule", ScheduledPolicy([[1.0, 1.0], [REUSE, 1.0], [1.0, REUSE], [SKIP, 1.0]]))
    return Case(compiled, inputs, (".pt2",), Record(("torch",), "hidden_states", "timestep", ("schedule",)))


CASES: Mapping[str, Callable[[], Case]] = {"routed": routed, "onnx": onnx, "flux": flux}


def _plain() -> tuple[nn.Module, dict[str, Tensor]]:
    """PlainDiT of three small blocks, and one call of two rows."""
    model = randomised(PlainDiT(dim=8, heads=1, depth=3, channels=4, block=SmallBlock))
    return model, {"x": noise(2, 5, 4), "t": torch.ones(2), "words": noise(2, 3, 12, seed=2)}
