"""Attention over (B, L, D) is seen as attention of one head, with the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

from passes.blocks.headless_attention import one_head
from tests.models import noise
from tests.test_real import trace

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def dims(module: torch.fx.GraphModule) -> list[list[int]]:
    """Dimensions of the result and the tensor arguments of every attention."""
    nodes = module.graph.find_nodes(op="call_function", target=ATTENTION)
    return [[node.meta["val"].dim(), *(given.meta["val"].dim() for given in node.all_input_nodes)] for node in nodes]


@pytest.mark.parametrize("mask", [None, noise(5, 7), noise(1, 5, 7), torch.ones(3, 5, 7, dtype=torch.bool)])
def test_three_dimensions_become_four_and_numbers_stay(mask: Tensor | None) -> None:
    query, key, value = noise(3, 5, 8), noise(3, 7, 8, seed=2), noise(3, 7, 6, seed=3)
    masks = () if mask is None else (mask,)
    module = trace(lambda *x: attention(*x, scale=0.3) * 2, query, key, value, *masks)
    expected = module(query, key, value, *masks)
    module, report = one_head(module)
    assert len(report.done) == 1
    assert dims(module) == [[4, 4, 4, 4, *(4 if m.ndim == 3 else 2 for m in masks)]]
    torch.testing.assert_close(module(query, key, value, *masks), expected)


def test_what_has_heads_is_left_alone() -> None:
    inputs = noise(3, 2, 5, 8), noise(3, 2, 7, 8, seed=2), noise(3, 2, 7, 8, seed=3)
    module = trace(attention, *inputs)
    before = str(module.graph)
    module, report = one_head(module)
    assert report.done == ()
    assert str(module.graph) == before
