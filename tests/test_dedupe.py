"""Blocks are grouped by what they run, and plans named by what they compute."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

from passes.graphs.graph import BlockGraph, PlanGraph, WeightPiece
from passes.observe.dedupe import group_blocks, plan_id
from passes.observe.discover import discover
from tests.models import PlainBlock, PlainDiT, noise, randomised, tiny_dit, tiny_flux, tiny_plain, tiny_sd3


def names(model: nn.Module, inputs: object) -> list[list[str]]:
    found, _ = discover(model, inputs)
    return [[site.name for site in group] for group in group_blocks(found.blocks)]


@pytest.mark.parametrize(
    ("make", "sizes"), [(tiny_flux, [2, 2]), (tiny_dit, [3]), (tiny_sd3, [2, 1]), (tiny_plain, [3])]
)
def test_groups_of_a_transformer(make: object, sizes: list[int]) -> None:
    groups = names(*make())
    assert [len(group) for group in groups] == sizes
    flat = [name for group in groups for name in group]
    assert len(set(flat)) == sum(sizes)


def test_many_blocks_are_few_groups() -> None:
    assert [len(group) for group in names(*tiny_flux(double=5, single=7))] == [5, 7]


class Wider(PlainBlock):
    pass


def test_differences_split_groups() -> None:
    _, inputs = tiny_plain()
    model = PlainDiT(depth=4)
    model.layers[1] = Wider(32, 2)
    model.layers[2].norm.eps = 1e-3
    model.layers[3].out = nn.Linear(32, 32, bias=False)
    assert names(randomised(model), inputs) == [["layers.0"], ["layers.1"], ["layers.2"], ["layers.3"]]


def test_constants_of_the_call_split_groups() -> None:
    class Flagged(PlainDiT):
        def forward(self, x: Tensor, t: Tensor, words: Tensor, mask: Tensor) -> Tensor:
            x, words = self.embed(x), self.text(words)
            vector = t[:, None].expand(-1, self.dim)
            for index, layer in enumerate(self.layers):
                x = layer(x, words, vector, mask if index else None)
            return self.head(x)

    _, inputs = tiny_plain()
    assert names(randomised(Flagged()), inputs) == [["layers.0"], ["layers.1", "layers.2"]]


def plan(function: object, rows: int = 4, batch: int | None = None, rename: str | None = None) -> PlanGraph:
    """A plan of one variant, traced from `function(weight, x)`."""
    graph = fx.symbolic_trace(function).graph
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = torch.empty(rows, 4) if node.name == "weight" else torch.empty(batch or 2, 4)
        elif node.op == "call_function" and rename:
            node.name = rename
    module = fx.GraphModule(nn.Module(), graph)
    block = BlockGraph(module, {"weight": "weight"}, ("x",), (0,), (0,))
    piece = WeightPiece("weight", "weight", 0, 0, rows, False, (rows,))
    return PlanGraph(block, (1.0,), (piece,), (module,))


def test_plan_names() -> None:
    def add(weight: Tensor, x: Tensor) -> tuple[Tensor]:
        return (torch.add(x, weight),)

    def subtract(weight: Tensor, x: Tensor) -> tuple[Tensor]:
        return (torch.sub(x, weight),)

    def twice(weight: Tensor, x: Tensor) -> tuple[Tensor]:
        return (torch.add(x, weight, alpha=2),)

    first = plan_id(plan(add))
    assert len(first) == 16 and int(first, 16) >= 0
    assert plan_id(plan(add)) == first
    assert plan_id(plan(add, rename="other")) == first
    others = [
        plan(subtract),
        plan(twice),
        plan(add, rows=8),
        replace(plan(add), widths=(0.5,)),
        replace(plan(add), block=replace(plan(add).block, states=(1,))),
        replace(plan(add), pieces=(replace(plan(add).pieces[0], transposed=True),)),
    ]
    assert len({first, *map(plan_id, others)}) == len(others) + 1


@cache
def dynamic_graph() -> tuple[fx.GraphModule, fx.GraphModule]:
    """The same function exported twice, the second time after other symbols were made."""

    class Twice(nn.Module):
        def forward(self, weight: Tensor, x: Tensor) -> tuple[Tensor]:
            return (x.reshape(x.shape[0] * 2, -1) @ weight,)

    def trace(batch: int) -> fx.GraphModule:
        dims = ({}, {0: torch.export.Dim.AUTO})
        return torch.export.export(Twice(), (noise(4, 4), noise(batch, 8)), dynamic_shapes=dims).graph_module

    return trace(3), trace(5)


def test_plan_names_ignore_example_sizes() -> None:
    plans = []
    for module in dynamic_graph():
        block = BlockGraph(module, {}, ("weight", "x"), (0, 1), (1,))
        plans.append(PlanGraph(block, (1.0,), (), (module,)))
    assert plan_id(plans[0]) == plan_id(plans[1])
