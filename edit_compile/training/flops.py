"""What decisions cost: the FLOPs of each block at each width, as parts of those of the dense model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edit_compile.elastic.layout import ElasticError
from edit_compile.elastic.straight_through import Routing
from edit_compile.elastic.transformer import ElasticTransformer
from passes.graphs.cost import model_flops
from passes.pipeline import run_passes
from passes.program.compilation import Compilation
from passes.program.plans import costs_of


def block_shares(elastic: ElasticTransformer, inputs: Mapping[str, Any]) -> Tensor:
    """FLOPs of each block at each of the routers' widths over those of the dense model, (n, |S|) float32.

    `inputs` are keyword arguments of a call. ElasticError where other blocks are found in it than have routers.
    """
    widths = elastic.router_config.widths
    with elastic.detached():
        given = Compilation(elastic.model, inputs, elastic.timestep, elastic.narrow, widths, stated=elastic.stated)
        made = run_passes(given, until="plans")
        whole = model_flops(elastic.model, made.discovery.buckets[0][0])
    found = [site.name for site in made.blocks]
    if elastic.layout is None or found != [block.name for block in elastic.layout.blocks]:
        raise ElasticError(f"{len(found)} blocks are found in the recorded calls, others than those with routers")
    flops = {(cost.plan, cost.variant): cost.flops for cost in costs_of(made.planned, 0)}
    plans = [made.planned[owner].plan for owner in made.group_of]
    rows = [[flops[plan.id, plan.variant_at(width)] for width in widths] for plan in plans]
    return torch.tensor(rows, dtype=torch.float32) / whole


def flops_share(routing: Routing, shares: Tensor) -> Tensor:
    """FLOPs of a call by its decisions, as a share of the dense model's (scalar, with their gradients).

    What is not in the blocks is computed in full: it counts 1 - the sum of `shares` (n, |S|) at full width.
    """
    shares = shares.to(routing.gate.device)
    rest = 1 - shares[:, -1].sum()
    return rest + (routing.gate[..., None] * routing.choice * shares).sum((1, 2)).mean()
