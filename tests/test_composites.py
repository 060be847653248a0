"""Exported programs hold functional operators alone, and give what the code gives at sizes they were not traced at."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from passes.blocks.quiet_export import exported


def _imaginary(x: Tensor, twin: bool = False) -> Tensor:
    z = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    return (z.conj() if twin else z).resolve_conj().imag.repeat(1, 1, 2)


STEPS: dict[str, Callable[[Tensor], Tensor]] = {  # each maps (batch, tokens, 8) to the same
    "chunk": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "chunk, one part unused": lambda x: x.chunk(2, -1)[1].repeat(1, 1, 2),
    "unflatten": lambda x: x.unflatten(-1, (2, -1)).transpose(2, 3).flatten(2),
    "flatten": lambda x: (x.flatten(0, 1) * 2).unflatten(0, (x.shape[0], x.shape[1])),
    "reshape": lambda x: x.transpose(1, 2).reshape(x.shape) + 1,
    "to its own dtype": lambda x: x.to(torch.float32),
    "to another dtype": lambda x: x.to(torch.float64).to(x.dtype) * 0.5,
    "contiguous": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=False),
    "expand_as": lambda x: x + x[:, :1].expand_as(x),
    "type_as": lambda x: x.bool().type_as(x) + x,
    "tensor_split": lambda x: torch.cat(x.tensor_split([3, 5], -1)[::-1], -1),
    "swapped twice": lambda x: x.swapaxes(0, 1).swapaxes(0, 1),
    "of both twins of a complex number": lambda x: _imaginary(x) + _imaginary(x, twin=True),
    "products of heads": lambda x: x.view(*x.shape[:2], 2, 4).matmul(x.new_ones(4, 4)).flatten(2),
}
WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda x: x.clone().mul_(2),
    "in a view": lambda x: (y := x.clone(), y[..., :4].zero_(), y)[-1],
    "without gradients": torch.no_grad()(lambda x: x.chunk(2, -1)[0].repeat(1, 1, 2)),
}


class Chain(nn.Module):
    def __init__(self, steps: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, *given: Tensor) -> tuple[Tensor]:
        (x,) = given
        for step in self.steps:
            x = step(x).sin()
        return (x,)


def check(steps: list[Callable[[Tensor], Tensor]]) -> None:
    program = exported(Chain(steps), [torch.randn(3, 5, 8)], [{0: Dim.AUTO, 1: Dim.AUTO}])
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            assert not getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    for shape in ((3, 5, 8), (2, 5, 8), (7, 11, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(torch.fx.Interpreter(program.graph_module).run(x)[0], Chain(steps)(x)[0])


@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_operators_that_may_give_views_become_what_they_come_to(names: list[str]) -> None:
    check([STEPS[name] for name in names])


@pytest.mark.parametrize("name", WRITES)
def test_what_writes_becomes_functional_too(name: str) -> None:
    check([STEPS["unflatten"], WRITES[name], STEPS["chunk"]])


def test_operators_that_give_no_views_stay_whole() -> None:
    program = exported(
        Chain([nn.Linear(8, 8), nn.LayerNorm(8), STEPS["chunk"]]), [torch.randn(3, 5, 8)], [{0: Dim.AUTO}]
    )
    held = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {torch.ops.aten.linear.default, torch.ops.aten.layer_norm.default, torch.ops.aten.split.Tensor} <= held
    assert torch.ops.aten.chunk.default not in held
