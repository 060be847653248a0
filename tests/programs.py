"""Small programs made by hand, without any pass: two kinds of blocks, on both engines."""

from __future__ import annotations

from functools import lru_cache

import onnx.parser
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from runtime.base.guard import guard
from runtime.bundle import archive as pt2
from runtime.bundle.program import Program
from runtime.bundle.spec import (
    SCHEMA,
    Block,
    Cost,
    Glue,
    GlueInput,
    Manifest,
    Plan,
    PlanInput,
    Policy,
    RouterConfig,
    Variant,
)
from runtime.routing.router import Router

D, H, E, C = 8, 16, 6, 4
IMAGE, TEXT = 5, 3
WIDTHS = (0.25, 0.5, 0.75, 1.0)
ROUTER = RouterConfig(hidden=8, widths=WIDTHS, time_dim=6)


class Double(nn.Module):
    """Two streams, a time embedding, and a table that all rows share."""

    def forward(
        self,
        up: Tensor,
        bias: Tensor,
        down: Tensor,
        mix: Tensor,
        hidden: Tensor,
        text: Tensor,
        time: Tensor,
        table: Tensor,
    ) -> tuple[Tensor, Tensor]:
        shift = (time @ mix)[:, None] + text.mean(1, keepdim=True)
        narrow = F.gelu(F.linear(hidden + table, up, bias)) @ down
        return hidden + narrow + shift, text + hidden.mean(1, keepdim=True) * 0.5


class Single(nn.Module):
    """One stream and no time embedding."""

    def forward(self, up: Tensor, down: Tensor, hidden: Tensor) -> tuple[Tensor]:
        return (hidden + torch.relu(hidden @ up.t()) @ down,)


DOUBLE_ONNX = """
<ir_version: 10, opset_import: ["": 20]>
g (float[h,D] up, float[h] bias, float[h,D] down, float[E,D] mix,
   float[b,l,D] hidden, float[b,m,D] text, float[b,E] time, float[l,D] table)
  => (float[b,l,D] state_0, float[b,m,D] state_1) {
  axis = Constant <value_ints = [1]> ()
  half = Constant <value_float = 0.5> ()
  mixed = MatMul (time, mix)
  lifted = Unsqueeze (mixed, axis)
  pooled = ReduceMean (text, axis)
  shift = Add (lifted, pooled)
  placed = Add (hidden, table)
  turned = Transpose <perm = [1, 0]> (up)
  projected = MatMul (placed, turned)
  biased = Add (projected, bias)
  active = Gelu (biased)
  narrow = MatMul (active, down)
  grown = Add (hidden, narrow)
  state_0 = Add (grown, shift)
  seen = ReduceMean (hidden, axis)
  halved = Mul (seen, half)
  state_1 = Add (text, halved)
}"""

SINGLE_ONNX = """
<ir_version: 10, opset_import: ["": 20]>
g (float[h,D] up, float[h,D] down, float[b,l,D] hidden) => (float[b,l,D] state_0) {
  turned = Transpose <perm = [1, 0]> (up)
  projected = MatMul (hidden, turned)
  active = Relu (projected)
  narrow = MatMul (active, down)
  state_0 = Add (hidden, narrow)
}"""


class GlueModel(nn.Module):
    """Projections around `kinds` of blocks ("double" or "single")."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.kinds = kinds

    def forward(
        self,
        into: Tensor,
        timing: Tensor,
        out: Tensor,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
    ) -> tuple[Tensor]:
        hidden, text = hidden_states @ into, encoder_hidden_states
        time = torch.sin(timestep[:, None] * timing)
        table = torch.arange(IMAGE * D, dtype=torch.float32).reshape(IMAGE, D) * 0.01
        for index, kind in enumerate(self.kinds):
            if kind == "double":
                hidden, text = guard([hidden, text, time, table], [0, 1], index)
            else:
                (hidden,) = guard([hidden], [0], index)
        return (hidden @ out,)


DOUBLE = Plan(
    id="double",
    kind="Double",
    inputs=(
        PlanInput("hidden", "float32", (None, IMAGE, D), 0),
        PlanInput("text", "float32", (None, TEXT, D), 0),
        PlanInput("time", "float32", (None, E), 0),
        PlanInput("table", "float32", (IMAGE, D), None),
    ),
    states=(0, 1),
    time=2,
    weights=("up", "bias", "down", "mix"),
    variants=tuple(Variant(w, (int(w * H), int(w * H), int(w * H), E)) for w in WIDTHS),
)
SINGLE = Plan(
    id="single",
    kind="Single",
    inputs=(PlanInput("hidden", "float32", (None, IMAGE, D), 0),),
    states=(0,),
    time=None,
    weights=("up", "down"),
    variants=tuple(Variant(w, (int(w * H), int(w * H))) for w in WIDTHS),
)
PLANS = {"double": DOUBLE, "single": SINGLE}
MODULES = {"double": Double(), "single": Single()}


@lru_cache
def plan_files() -> dict[str, bytes]:
    """Both kinds of files of both plans."""
    hidden, text = torch.randn(2, IMAGE, D), torch.randn(2, TEXT, D)
    time, table = torch.randn(2, E), torch.randn(IMAGE, D)
    up, bias, down, mix = torch.randn(H, D), torch.randn(H), torch.randn(H, D), torch.randn(E, D)
    any_size = {0: Dim.AUTO}
    double = torch.export.export(
        Double(),
        (up, bias, down, mix, hidden, text, time, table),
        dynamic_shapes=(any_size, any_size, any_size, None, any_size, any_size, any_size, None),
    )
    single = torch.export.export(Single(), (up, down, hidden), dynamic_shapes=(any_size,) * 3)
    graphs = {"double": pt2.dump(double.run_decompositions({})), "single": pt2.dump(single.run_decompositions({}))}
    files = {}
    for w in WIDTHS:
        rows, percent = int(w * H), f"w{round(100 * w):03d}"
        for name, text_form in (("double", DOUBLE_ONNX), ("single", SINGLE_ONNX)):
            files[f"plans/{name}-{percent}.pt2"] = graphs[name]
            sized = text_form.replace("h,D", f"{rows},{D}").replace("[h]", f"[{rows}]").replace("D]", f"{D}]")
            files[f"plans/{name}-{percent}.onnx"] = onnx.parser.parse_model(
                sized.replace("[E,", f"[{E},").replace(",E]", f",{E}]")
            ).SerializeToString()
    return files


@lru_cache
def glue_file(kinds: tuple[str, ...]) -> bytes:
    """The glue around blocks of `kinds`."""
    example = (
        torch.randn(C, D),
        torch.randn(E),
        torch.randn(D, C),
        torch.randn(2, IMAGE, C),
        torch.randn(2, TEXT, D),
        torch.rand(2),
    )
    dims = (None, None, None, {0: Dim.AUTO}, {0: Dim.AUTO}, {0: Dim.AUTO})
    # run_decompositions would also accept the guard, but the glue here has nothing to decompose
    return pt2.dump(torch.export.export(GlueModel(kinds), example, dynamic_shapes=dims))


def make(kinds: tuple[str, ...] = ("double", "single", "double"), seed: int = 0, routers: bool = True) -> Program:
    """A program of blocks of `kinds` with random weights and routers."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * 0.5

    weights = {"glue.into": random(C, D), "glue.timing": random(E), "glue.out": random(D, C)}
    blocks, router_weights = [], {}
    for index, kind in enumerate(kinds):
        plan = PLANS[kind]
        shapes = {"up": (H, D), "bias": (H,), "down": (H, D), "mix": (E, D)}
        keys = tuple(f"blocks.{index}.{name}" for name in plan.weights)
        weights |= {key: random(*shapes[name]) for key, name in zip(keys, plan.weights, strict=True)}
        blocks.append(Block(name=f"blocks.{index}", plan=kind, weights=keys))
        router = Router(ROUTER, D, E)
        for name, parameter in router.state_dict().items():
            scale = 4 if name.startswith(("gate", "width")) else 1
            router_weights[f"{index}.{name}"] = random(*parameter.shape) * scale
    used = tuple(PLANS[kind] for kind in dict.fromkeys(kinds))
    costs = tuple(
        Cost(plan.id, v, int(1000 * variant.width), int(100 * variant.width), int(20 * variant.width))
        for plan in used
        for v, variant in enumerate(plan.variants)
    )
    glue = Glue(
        id="a",
        file="glue/a.pt2",
        inputs=(
            GlueInput("hidden_states", "float32", (None, IMAGE, C)),
            GlueInput("encoder_hidden_states", "float32", (None, TEXT, D)),
            GlueInput("timestep", "float32", (None,)),
        ),
        constants={},
        weights=("glue.into", "glue.timing", "glue.out"),
        outputs=("sample",),
        flops=10,
        costs=costs,
        latents=(("hidden_states", 0),),
    )
    example_names = tuple(given.name for given in glue.inputs)
    manifest = Manifest(
        schema=SCHEMA,
        model="Synthetic",
        config={"in_channels": C, "guidance_embeds": False},
        dtype="float32",
        timestep="timestep",
        arguments=(*example_names, "joint_attention_kwargs", "scale", "return_dict"),
        widths=WIDTHS,
        plans=used,
        blocks=tuple(blocks),
        glues=(glue,),
        router=ROUTER if routers else None,
        policy=Policy(),
    )
    files = {n: data for n, data in plan_files().items() if n.split("/")[1].split("-")[0] in kinds}
    return Program(manifest, weights, router_weights if routers else {}, files | {"glue/a.pt2": glue_file(kinds)})


def inputs(rows: int = 1, seed: int = 0, timestep: float = 1.0) -> dict[str, Tensor]:
    """Arguments of the program's forward."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(rows, IMAGE, C, generator=draw),
        "encoder_hidden_states": torch.randn(rows, TEXT, D, generator=draw),
        "timestep": torch.full((rows,), timestep),
    }
